"""Folders that are whole or not there: filled next to their place, sealed, and moved into it.

Whatever fails on the way, nothing half-written stays: what is staged goes, and a full disk is told
with its name and what was needed, measured after that. A killed process leaves its staged folder
to the next one, which puts it in its place where it is whole and nothing else stands there.
Standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rrhf.errors import UserError
from rrhf.files import explained_os_errors, sync_folder
from rrhf.sealed_folders import damage_of, seal_folder

STAGED, DOOMED = ".staged-", ".doomed-"
"""How names begin of folders that are being filled, and of those that are being removed."""

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would pass the largest size allowed (ulimit -f, or the disk's own)",
}
_NATIVE_ERROR = re.compile(r"\(os error (\d+)\)")


class FullDisk(Exception):
    """Raised where something could not be written for lack of space, until the disk is told of.

    Attributes:
        needed_bytes: what all of it would have taken.
    """

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"no space for {needed_bytes:,} bytes")
        self.needed_bytes = needed_bytes


@contextmanager
def telling_need(needed_bytes: int) -> Iterator[None]:
    """Context manager: turns a full disk into a `FullDisk` that knows the bytes needed."""
    try:
        yield
    except Exception as error:
        if full_disk(error) is None:
            raise
        raise FullDisk(needed_bytes) from error


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
        written = size_of(staged)
        shutil.rmtree(staged, ignore_errors=True)
        raise told_failure(error, staged, written) from error


def told_failure(error: BaseException, staged: Path, written: int = 0) -> BaseException:
    """An error of writing as a message with what to do; any other as it is.

    Args:
        error: what came.
        staged: the folder, removed already, so that free space is measured without it.
        written: bytes that it held.
    """
    if (reason := full_disk(error)) is not None:
        return _no_space(staged.parent, reason, _needed_bytes(error), written)
    try:
        with explained_os_errors(staged):
            raise error
    except BaseException as told:
        return told


def _needed_bytes(error: BaseException | None) -> int | None:
    for link in _chain(error):
        if isinstance(link, FullDisk):
            return link.needed_bytes
    return None


def full_disk(error: BaseException | None) -> str | None:
    """Why nothing more can be written, where an error or what caused it says so; else None.

    Libraries that write by themselves tell of it in their own errors, with the system's number.
    """
    for link in _chain(error):
        number = link.errno if isinstance(link, OSError) else None
        if number is None and (found := _NATIVE_ERROR.search(str(link))):
            number = int(found.group(1))
        if number in _FULL:
            return _FULL[number]
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _no_space(folder: Path, reason: str, needed_bytes: int | None, written: int) -> UserError:
    """The message of a full disk: its name, what was needed, what is free."""
    needed = f"more than {written:,}" if needed_bytes is None else f"{needed_bytes:,}"
    disk = _disk_of(folder)
    try:
        free = f"{shutil.disk_usage(disk).free:,}"
    except OSError:
        free = "an unknown number of"
    return UserError(
        f"{folder}: {reason}: {needed} bytes needed, {free} bytes free on the disk mounted at "
        f"{disk}; make room there and go on with --resume_from_checkpoint, or choose an output on "
        "another disk"
    )


def _disk_of(path: Path) -> Path:
    place = path.absolute()
    while not os.path.ismount(place) and place != place.parent:
        place = place.parent
    return place


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder, at any depth; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def saved_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder next to its place, seal it, and move it there, in place of an older one.

    Args:
        target: such as `policy/`.
        write: fills the folder that it is given.

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
    """Where a folder is filled, and where an older one goes until the new one has its place."""
    return target.with_name(f"{STAGED}{target.name}"), target.with_name(f"{DOOMED}{target.name}")


def put_back(target: Path) -> None:
    """Give a name its folder again, after a kill between the two renamings of `saved_folder`.

    The new one where it is whole, else the older one.
    """
    staged, old = _beside(target)
    if target.exists() or not (staged.is_dir() and old.is_dir()):
        return
    for path in (staged, old):
        if damage_of(path) is None:
            os.replace(path, target)
            sync_folder(target.parent)
            return


def remove_unfinished(folder: Path) -> None:
    """Delete what killed saves and deletions left in a folder, once `put_back` had its turn."""
    if folder.is_dir():
        for path in [*folder.iterdir()]:
            if path.name.startswith(DOOMED):
                put_back(folder / path.name.removeprefix(DOOMED))
        for path in folder.iterdir():
            if path.name.startswith((STAGED, DOOMED)) and path.is_dir():
                shutil.rmtree(path)
