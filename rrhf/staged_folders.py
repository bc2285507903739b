"""Writes folders so that they are complete or absent: filled elsewhere, sealed, then renamed.

If writing fails, the staged folder is removed, and then a full disk is reported with what was
needed and what is free. A killed process leaves its staged folder behind: the next process moves it
into place if it is whole and its name is free.
Standard library only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rrhf.files import sync_folder
from rrhf.os_errors import explained_os_errors, told_failure
from rrhf.sealed_folders import damage_of, seal_folder

STAGED, DOOMED = ".staged-", ".doomed-"
"""Prefixes of folders that are being filled, and of those that are being removed."""


@contextmanager
def no_trace_of_failure(staged: Path) -> Iterator[None]:
    """Context manager for filling a staged folder: removes it on failure, reports a full disk.

    Args:
        staged: the folder.

    Raises:
        UserError: no space, or the place cannot be written.
    """
    try:
        yield
    except BaseException as error:
        written = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
        shutil.rmtree(staged, ignore_errors=True)
        raise told_failure(error, staged, written) from error


def saved_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder next to its place, seal it, and move it there, in place of an older one.

    Args:
        target: such as `policy/`.
        write: fills the folder that it receives.

    Raises:
        UserError: no space, or the place cannot be written.
    """
    put_back(target)
    staged, old = _beside(target)
    for leftover in (staged, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    with no_trace_of_failure(staged):
        staged.mkdir(parents=True)
        write(staged)
        seal_folder(staged)
    with explained_os_errors(target):
        if target.exists():
            os.replace(target, old)
        os.replace(staged, target)
        sync_folder(target.parent)
        if old.exists():
            shutil.rmtree(old)


def _beside(target: Path) -> tuple[Path, Path]:
    """The names of the folder while it is filled, and of the older one until it is replaced."""
    return target.with_name(f"{STAGED}{target.name}"), target.with_name(f"{DOOMED}{target.name}")


def put_back(target: Path) -> None:
    """Repair the effect of a kill between the two renamings of `saved_folder`.

    The new folder gets the name if it is whole, otherwise the older one.
    """
    staged, old = _beside(target)
    if target.exists() or not (staged.is_dir() and old.is_dir()):
        return
    for path in (staged, old):
        if damage_of(path) is None:
            os.replace(path, target)
            sync_folder(target.parent)
            return


def remove_folder(folder: Path) -> None:
    """Remove a folder, renamed first so that a kill cannot leave half of it under its name."""
    doomed = _beside(folder)[1]
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Delete what killed saves and deletions left in a folder; call `put_back` first."""
    if folder.is_dir():
        for path in [*folder.iterdir()]:
            if path.name.startswith(DOOMED):
                put_back(folder / path.name.removeprefix(DOOMED))
        for path in folder.iterdir():
            if path.name.startswith((STAGED, DOOMED)) and path.is_dir():
                shutil.rmtree(path)
