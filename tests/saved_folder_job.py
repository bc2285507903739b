"""A folder that is saved over an older one, or what a kill left swept up, for tests to kill."""

from __future__ import annotations

from pathlib import Path

import rrhf.training.core.checkpoint  # noqa: F401  here, so that forked jobs need not import it
from rrhf.staged_folders import remove_unfinished, saved_folder


def save(folder: Path, text: str) -> None:
    def write(staged: Path) -> None:
        (staged / "weights").write_text(text)
        (staged / "config").write_text(text)

    saved_folder(folder / "policy", write)


def save_or_sweep(folder: str) -> None:
    """Sweeps where something hidden is there."""
    if any(path.name.startswith(".") for path in Path(folder).iterdir()):
        remove_unfinished(Path(folder))
    else:
        save(Path(folder), "new")
