"""Turns errors of the operating system into one message that names the place and the fix.

All writing happens within `explained_os_errors`. For a full disk, the message gives the space
needed and the space free, measured after incomplete files are removed. Libraries that write files
report a full disk with their own exceptions, which `full_disk` recognises. Standard library only.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rrhf.errors import UserError

PathLike = str | os.PathLike[str]

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk, or a quota that is used up."""
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would pass the largest size allowed (ulimit -f, or the disk's own)",
}
_FIXES = {
    "EROFS EACCES EPERM": "choose an output that you may write to",
    "EISDIR ENOTDIR EEXIST ENOTEMPTY": "a file stands where a folder is needed, or a folder where "
    "a file is; choose another path",
    "ENAMETOOLONG": "choose a shorter name: temporary files next to it have a longer one",
    "EMFILE": "this process may not open more files; raise its limit (ulimit -n)",
    "ENFILE": "this machine may not open more files; end other programs",
    "EIO ESTALE ENOTCONN ENODEV ENXIO": "check the disk, or choose an output on another disk",
    "EFBIG": "a file may not grow so large there (ulimit -f, or the disk's own limit); choose an "
    "output on another disk",
    "EBUSY ETXTBSY": "end the program that uses it",
    "EINVAL ENOTSUP": "its disk takes no such file or name; choose another output",
}
_FIX_OF = {getattr(errno, name): fix for names, fix in _FIXES.items() for name in names.split()}
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.tmp", re.DOTALL)
_NATIVE_ERROR = re.compile(r"\(os error (\d+)\)")
_OPEN_STREAM = re.compile(r"/dev/std(in|out|err)|(/dev|/proc/[^/]+)/fd/\d+")
_SPECIAL = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NO_WORKING_FOLDER = (
    "the folder that this was started in does not exist any more; start it elsewhere"
)


@contextmanager
def explained_os_errors(path: PathLike, needed_bytes: int | None = None) -> Iterator[None]:
    """Context manager: turn a failure to write a file into a `UserError` with the fix.

    Errors that have nothing to do with files pass through.

    Args:
        path: the file that is being written.
        needed_bytes: the bytes to be written; None = unknown.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            raise no_space(path, needed_bytes) from error
        if error.errno not in (errno.ENOENT, errno.ELOOP, *_FIX_OF):
            raise
        named = error.filename if isinstance(error.filename, str) else os.fspath(path)
        folder, name = os.path.split(named)
        if found := _TEMPORARY.fullmatch(name):
            named = os.path.join(folder, found.group(1))
        raise UserError(_refusal(os.fspath(path), named, error)) from error


def _refusal(given: str, path: str, error: OSError) -> str:
    """Return the message for a path that cannot be written; `given` is the path that the caller
    wanted to write."""
    for link in (given, path):
        if os.path.islink(link) and not os.path.exists(link):
            return (
                f"{link}: is a symbolic link that leads nowhere (to {os.readlink(link)}); remove "
                "the link, or choose another output"
            )
    if error.errno == errno.ELOOP:
        return (
            f"{path}: is a symbolic link, and what it points to must not be written; remove the "
            "link, or choose another output"
        )
    if error.errno != errno.ENOENT:
        return f"{path}: cannot be written ({error.strerror}); {_FIX_OF[error.errno or 0]}"
    if not _has_working_folder():
        return _NO_WORKING_FOLDER
    if not os.path.exists(os.path.dirname(os.path.abspath(path))):
        return f"{path}: its folder does not exist; make the folder first"
    return (
        f"{path}: cannot be written ({error.strerror}): its folder takes no new files, or "
        "something removed it meanwhile; choose another output"
    )


def require_working_folder() -> None:
    """Refuse to start in a working directory that no longer exists.

    Raises:
        UserError: the working directory was removed.
    """
    if not _has_working_folder():
        raise UserError(_NO_WORKING_FOLDER)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def special_file(path: PathLike) -> str | None:
    """Return the kind of a special file ("a pipe", "a socket", "a device"); None for any other
    path.

    Links are followed.
    """
    try:
        return _SPECIAL.get(stat.S_IFMT(os.stat(path).st_mode))
    except (OSError, ValueError):
        return None


def require_plain_output(path: PathLike) -> None:
    """Refuse to write to a pipe, a socket, a device, or an open stream such as `/dev/stdout`.

    Raises:
        UserError: the path is not a plain file.
    """
    kind = special_file(path)
    if kind is None and _OPEN_STREAM.fullmatch(os.fspath(path)):
        kind = "an open stream"
    if kind:
        raise UserError(
            f"{path}: is {kind}, but the output must be a file; remove it, or choose another output"
        )


def no_space(path: PathLike, needed_bytes: int | None, written: int | None = None) -> UserError:
    """Return the error for a full disk. Call it after incomplete files are removed.

    Args:
        path: the file that was being written.
        needed_bytes: size of the complete file; None = unknown.
        written: bytes written before the failure, used if `needed_bytes` is unknown.
    """
    return UserError(
        f"{path}: no space left: {_needed(needed_bytes, written)} bytes needed, "
        f"{_free_bytes(path)} bytes free there; make room, or choose an output on another disk"
    )


def _needed(needed_bytes: int | None, written: int | None) -> str:
    if needed_bytes is not None:
        return f"{needed_bytes:,}"
    return "an unknown number of" if written is None else f"more than {written:,}"


def _free_bytes(path: PathLike) -> str:
    """Return the free bytes of the disk that holds `path`, as text, or "unknown"."""
    place = Path(os.path.realpath(path)) if _has_working_folder() else Path(path)
    for folder in (place, *place.parents):
        try:
            return f"{shutil.disk_usage(folder).free:,}"
        except OSError:
            continue
    return "unknown"


# For folders whose files are written by several functions, some of them in libraries.


class FullDisk(Exception):
    """A write failed for lack of space; `explained_failure` turns this into a message.

    Attributes:
        needed_bytes: the total size of the data to be written.
    """

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"no space for {needed_bytes:,} bytes")
        self.needed_bytes = needed_bytes


@contextmanager
def explained_full_disk(needed_bytes: int) -> Iterator[None]:
    """Context manager: raise `FullDisk` with the bytes needed if the disk is full."""
    try:
        yield
    except Exception as error:
        if full_disk(error) is None:
            raise
        raise FullDisk(needed_bytes) from error


def full_disk(error: BaseException | None) -> str | None:
    """Return the reason, such as "the disk is full", if an error or its causes mean that; else
    None."""
    for link in _chain(error):
        number = link.errno if isinstance(link, OSError) else None
        if number is None and (found := _NATIVE_ERROR.search(str(link))):
            number = int(found.group(1))
        if number in _FULL:
            return _FULL[number]
    return None


def explained_failure(error: BaseException, staged: Path, written: int = 0) -> BaseException:
    """Turn a failure to write a folder into a `UserError`; return any other error unchanged.

    Args:
        error: the exception raised while the folder was written.
        staged: the folder; remove it first, so that free space is measured without it.
        written: the bytes that the folder held.
    """
    if (reason := full_disk(error)) is None:
        try:
            with explained_os_errors(staged):
                raise error
        except BaseException as told:
            return told
    needed = [link.needed_bytes for link in _chain(error) if isinstance(link, FullDisk)]
    folder = disk = staged.parent.absolute()
    while not os.path.ismount(disk) and disk != disk.parent:
        disk = disk.parent
    return UserError(
        f"{staged.parent}: {reason}: {_needed(needed[0] if needed else None, written)} bytes "
        f"needed, {_free_bytes(folder)} bytes free on the disk mounted at {disk}; make room there "
        "and go on with --resume_from_checkpoint, or choose an output on another disk"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
