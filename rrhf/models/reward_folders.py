"""Checks the folder of a reward model before any weight is read.

This module does not import torch, so that a wrong path is reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rrhf.errors import UserError
from rrhf.model_paths import MODEL_FILE, check_model_path, model_folder

_SUFFIXES = (".safetensors", ".pt", ".bin")


def require_score_head(name_or_path: str | Path) -> None:
    """Refuse a folder whose config.json names a language model; hub names are not checked.

    Raises:
        UserError: there is no such folder, or it does not hold a reward model.
    """
    check_model_path(name_or_path)
    try:
        config = json.loads((Path(model_folder(name_or_path)) / MODEL_FILE).read_bytes())
        architectures = [str(name) for name in config["architectures"]]
    except (OSError, ValueError, KeyError, TypeError):
        return  # a hub name, or a config that only transformers can read
    require_classifier(name_or_path, architectures)


def require_classifier(name_or_path: str | Path, architectures: Sequence[str]) -> None:
    """Refuse a model whose config names no sequence classifier in `architectures`.

    Raises:
        UserError: no architecture is a sequence classifier.
    """
    if not names_classifier(architectures):
        named = ", ".join(architectures) or "a model of no stated architecture"
        raise UserError(
            f"{name_or_path}: holds {named}, which is not a reward model (it has no score head); "
            "train a reward model from it with `rrhf train reward`, or name a reward model's folder"
        )


def names_classifier(architectures: Sequence[str]) -> bool:
    """Whether one of a config's `architectures` is a sequence classifier."""
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def config_folder(path: str | Path, base: str | Path | None) -> Path:
    """Find the folder of config.json and tokenizer: `base` if given, else the weights' folder.

    Raises:
        UserError: there is no config.json in this folder.
    """
    place = Path(model_folder(path))
    own = place if place.is_dir() else place.parent
    folder = own if base is None else Path(model_folder(base))
    if (folder / MODEL_FILE).is_file():
        return folder
    if base is not None:
        raise UserError(f"--reward_base {base}: holds no config.json; name the base model's folder")
    raise UserError(
        f"{path}: --reward_format trlx: no config.json next to the weights; name the folder of the "
        "base model (its config and tokenizer) with --reward_base"
    )


def weight_files(path: str | Path) -> list[Path]:
    """Return the weight files of a published model, in a stable order; safetensors come first.

    Raises:
        UserError: there is no such folder, or no weights in it.
    """
    place = Path(model_folder(path))
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{path}: no such folder or weight file; name a published model's folder")
    for suffix in _SUFFIXES:
        for index in sorted(place.glob(f"*{suffix}.index.json")):
            names = set(json.loads(index.read_text())["weight_map"].values())
            if missing := [name for name in sorted(names) if not (place / name).is_file()]:
                raise UserError(
                    f"{place}: {index.name} names {missing[0]}, which is missing; copy all files "
                    "of the published model"
                )
            return [place / name for name in sorted(names)]
        files = [
            file
            for file in sorted(place.glob(f"*{suffix}"))
            if not file.name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))
        ]
        if files:
            return files
    raise UserError(
        f"{place}: --reward_format trlx: no weights here; expected a .safetensors, .pt or .bin file"
    )
