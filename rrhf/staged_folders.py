"""Writes folders so that they are complete or absent: under a temporary name, then renamed.

The folder with the temporary name is called staged. If writing fails, it is removed; for a full
disk, the message then gives the space needed and the space free. A killed process leaves its staged
folder behind: `put_back` completes or undoes a replacement that was interrupted between its two
renames, and `remove_unfinished` deletes all other remains. Standard library only.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rrhf.files import sync_folder
from rrhf.os_errors import explained_failure, explained_os_errors
from rrhf.sealed_folders import damage_of, seal_folder

STAGED, DOOMED = ".staged-", ".doomed-"
"""Prefixes of the names of folders that are being filled, and of folders that are being removed."""


@contextmanager
def no_trace_of_failure(staged: Path) -> Iterator[None]:
    """Context manager: fill a staged folder; remove it on failure, and report a full disk.

    Args:
        staged: the folder.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except BaseException as error:
        written = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
        shutil.rmtree(staged, ignore_errors=True)
        raise explained_failure(error, staged, written) from error


def saved_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Write and seal a folder under a temporary name, then put it in place of `target`.

    Args:
        target: the final folder, such as `policy/`; an older one is replaced.
        write: a function that writes the files into the folder that it receives.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    put_back(target)
    staged, old = _temporary_names(target)
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


def _temporary_names(target: Path) -> tuple[Path, Path]:
    """Return the temporary names for `target`: of the new folder, and of the old folder to be
    removed."""
    return target.with_name(f"{STAGED}{target.name}"), target.with_name(f"{DOOMED}{target.name}")


def put_back(target: Path) -> None:
    """Restore `target` if a process was killed between the two renames of `saved_folder`.

    The new folder is used if it is complete, otherwise the old one.
    """
    staged, old = _temporary_names(target)
    if target.exists() or not (staged.is_dir() and old.is_dir()):
        return
    for path in (staged, old):
        if damage_of(path) is None:
            os.replace(path, target)
            sync_folder(target.parent)
            return


def remove_folder(folder: Path) -> None:
    """Rename a folder, then remove it, so that a kill cannot leave half of it under its name."""
    doomed = _temporary_names(folder)[1]
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(folder: Path) -> None:
    """Clean up a folder after killed saves and removals: restore what can be, delete the rest.

    Folders whose old version was already renamed are restored by `put_back`.
    """
    if folder.is_dir():
        for path in [*folder.iterdir()]:
            if path.name.startswith(DOOMED):
                put_back(folder / path.name.removeprefix(DOOMED))
        for path in folder.iterdir():
            if path.name.startswith((STAGED, DOOMED)) and path.is_dir():
                shutil.rmtree(path)
