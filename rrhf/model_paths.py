"""Which folder a model's name means: a model folder itself, or the main model of a run folder.

A run leaves its model in a folder inside (`policy/`, `reward_model/`), and its manifest says in
which. Whoever is given a model's name asks here before anything is loaded, so a run folder may
stand wherever a model folder is meant. Standard library only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.files import COMPLETE, read_manifest
from rrhf.runs import are_settings, settings_file

MODEL_FILE = "config.json"
"""The file of Hugging Face that makes a folder a model folder."""

MODEL_NAMES = ("policy", "reward_model")
"""Where a run's main model stands."""


def model_folder(name_or_path: str | Path) -> str:
    """The folder to load for a model's name.

    Args:
        name_or_path: a model folder, a run folder (its main model is meant), a `best/` folder of a
            run, a hub name, or a file; `~` is the home folder.

    Returns:
        what is neither a run nor begins with `~` as it was given.

    Raises:
        UserError: a run folder that holds no model, or several of which none is the main one.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    plain = str(path) if text.startswith("~") else text
    if not path.is_dir() or holds_model(path):
        return plain
    name = _main_model(path)
    if name is not None and holds_model(path / name):
        return str(path / name)
    if settings_file(path) is not None:
        raise UserError(f"{text}: {_why_empty(path, name)}")
    return plain


def holds_model(folder: Path) -> bool:
    """Whether a folder is a model folder itself."""
    config = folder / MODEL_FILE
    return config.is_file() and not are_settings(config)


def check_model_path(name_or_path: str | Path) -> None:
    """A path that looks local must exist: otherwise a hub would be asked for a typing error.

    Raises:
        UserError: the folder is missing, or holds no config.json, or is a run without a model.
    """
    text = str(name_or_path)
    given = Path(text).expanduser()
    looks_local = text.startswith((".", "/", "~")) or text.count("/") != 1 or given.exists()
    if not looks_local:
        return
    if not given.is_dir():
        raise UserError(
            f"{text}: no such model folder; give a folder with config.json, or a hub name in the "
            "form owner/name, such as openai-community/gpt2-medium"
        )
    path = Path(model_folder(name_or_path))
    if not holds_model(path):
        inner = [path / name for name in MODEL_NAMES if holds_model(path / name)]
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise UserError(f"{text}: the folder has no config.json, so it holds no model{hint}")


def _main_model(run: Path) -> str | None:
    """The name of the main model's folder, where a manifest vouches for it."""
    manifest: dict[str, Any] = read_manifest(run) or {}
    if manifest.get("status") != COMPLETE:
        return None
    named = manifest.get("model_folder")
    if isinstance(named, str):
        return named if named == Path(named).name else None
    if settings_file(run) is None:
        return None
    there = [name for name in MODEL_NAMES if holds_model(run / name)]
    return there[0] if there else None


def _why_empty(run: Path, name: str | None) -> str:
    if name is not None:
        return (
            f"a finished run whose {name}/ is not there any more; the same training with "
            "--resume_from_checkpoint makes it again from its last checkpoint"
        )
    kept = [
        path.parent
        for pattern in ("best/*", "policies/*", "reward_models/*")
        for path in sorted(run.glob(f"{pattern}/{MODEL_FILE}"))
    ]
    hint = f", or give a model that it kept on its way, such as {kept[-1]}" if kept else ""
    return (
        "a run that is not finished, so its model is not there yet; go on with "
        f"--resume_from_checkpoint{hint}"
    )
