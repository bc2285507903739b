"""File locks (flock) that allow one writer at a time.

The operating system releases a lock when its process ends, even if it is killed. On a file system
that does not support locks, work continues unlocked, with a warning. A file whose mere presence is
the lock would not do, because a killed process would leave it behind. Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path

from rrhf.errors import UserError
from rrhf.os_errors import PathLike, explained_os_errors, require_plain_output

logger = logging.getLogger(__name__)


def try_lock(handle: int) -> bool:
    """Lock an open file; return False if another process holds the lock or the disk has no
    locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def lock_or_warn(handle: int, path: PathLike) -> bool:
    """Lock an open file; if its disk cannot lock files, log a warning and return False.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from error
        logger.warning("%s: this disk cannot lock files (%s); going on unlocked", path, error)
        return False
    return True


def is_at(path: PathLike, handle: int) -> bool:
    """Whether the open file is still the file at `path`."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


class FileLock:
    """A lock file that at most one process holds; the file names that process and its host."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._handle: int | None = None

    def acquire(self, what: str) -> None:
        """Take the lock, or raise a `UserError` that names the process and host that hold it.

        Args:
            what: what is locked, for the message, such as "the run folder runs/a".
        """
        assert self._handle is None, f"{self.path} is locked by this object already"
        require_plain_output(self.path)
        with explained_os_errors(self.path):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not lock_or_warn(handle, self.path):
                os.close(handle)
                return
        except BlockingIOError as error:
            holder = _describe_holder(os.pread(handle, 4096, 0))
            os.close(handle)
            raise UserError(
                f"{what} is in use by {holder}; wait for it, stop it, or choose another output"
            ) from error
        holder_row = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
        os.ftruncate(handle, 0)
        with explained_os_errors(self.path):
            os.pwrite(handle, json.dumps(holder_row).encode("ascii"), 0)
        self._handle = handle

    def release(self) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            # Closing alone would not unlock: a forked worker may hold the same open file.
            fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = None


def _describe_holder(data: bytes) -> str:
    try:
        row = json.loads(data)
        return f"process {row['pid']} on host {row['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
