"""JSON Lines: rows read one at a time, and rows written as they come so that a kill loses none.

Reads `.jsonl` and `.json`, plain or gzip, JSON lines or one JSON array; how, and what counts as a
fault, stands in `rrhf.data.json_scan`. Left out on purpose: what a row must hold.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from rrhf.data.json_scan import Fault, Faults, scan_rows
from rrhf.errors import UserError
from rrhf.files import cut_torn_tail, locked_temporary, remove_abandoned, sync_folder
from rrhf.locks import is_at, lock_or_warn
from rrhf.os_errors import PathLike, explained_os_errors, require_plain_output

_decoder = json.JSONDecoder()
_encoded = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode

SYNC_EVERY_SECONDS = 1.0
_SURE_BYTES = 20  # of a first line that was cut, to know it by
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
_START_AGAIN = "start the same command again: what is missing is made again"


def read_rows(path: PathLike) -> Iterator[tuple[int, Any]]:
    """The rows of a file with their line numbers, from 1; streaming.

    Raises:
        UserError: there is no such file, or some of it is not JSON; rows before the first fault
            have been yielded by then, and the message names up to 20 faults.
    """
    faults = Faults()
    for item in scan_rows(path):
        if isinstance(item, Fault):
            faults.add_fault(item.place_in(path), item)
            if faults.is_full:
                break
        elif not faults:
            yield item.line, item.value
    faults.raise_if_any()


def decode_row(line: bytes) -> Any:
    """The value of a line that was found to be JSON before.

    Raises:
        ValueError: it is not any more.
    """
    text = line.decode("utf-8").strip()
    value, end = _decoder.raw_decode(text)
    if end < len(text):
        raise ValueError(f"something follows the row: {text[end : end + 20]!r}")
    return value


def encode_row(value: Any) -> bytes:
    """A value as one line of JSON in UTF-8, newline included.

    The line marks that some readers break lines at (U+0085, U+2028, U+2029) are escaped; NaN is
    refused. Half a surrogate pair, which UTF-8 cannot hold, makes the whole row ASCII escapes.
    """
    text = _encoded(value)
    if text.isascii():
        return text.encode("ascii") + b"\n"
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode("ascii") + b"\n"
    for mark in ("\u0085", "\u2028", "\u2029"):
        if mark in text:
            data = data.replace(mark.encode("utf-8"), f"\\u{ord(mark):04x}".encode("ascii"))
    return data + b"\n"


def begins_with(data: bytes, first: bytes) -> bool:
    """Whether a file begins with a line, or was cut inside it where no chance would have it."""
    return data.startswith(first) or (len(data) >= _SURE_BYTES and first.startswith(data))


def _write_all(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


class JsonlAppender:
    """Appends rows to a JSON Lines file so that a kill loses none that was handed over.

    Each row goes to the system at once (a killed process loses nothing), and to the disk every
    second (a power cut loses little). One process at a time; who else removes the file or changes
    its size is noticed at the next row or sync. Symbolic links are not followed.

    Args:
        path: the file, made if it is not there.
        first: the line that a new file begins with, which says whose it is. A file that begins
            otherwise is somebody else's and left as it is.

    Attributes:
        path: the file.
        bytes_cut: how many bytes of an unfinished last line were cut on opening.

    Raises:
        UserError: it is somebody else's, a link, no file, an array or gzip, or another process
            writes it.
    """

    def __init__(self, path: PathLike, first: bytes = b"") -> None:
        self.path = Path(path)
        if self.path.name.endswith(".gz"):
            raise UserError(f"{path}: rows are appended to plain files; drop the .gz of its name")
        self._first = first
        self._synced_at = time.monotonic()
        require_plain_output(path)
        with explained_os_errors(path):
            remove_abandoned(path)
            self._handle: int | None = self._open()
        try:
            self._require_ours(self._handle)
            self.bytes_cut = cut_torn_tail(path)
            self._size = os.fstat(self._handle).st_size
            if self._size == 0 and first:
                self.append_lines([first])
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        """The file's handle, locked; a new file has its first line before it has its name."""
        while True:
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW)
            except FileNotFoundError:
                new = self._make()
                if new is not None:
                    return new
                continue
            try:
                self._lock(handle)
                if is_at(self.path, handle):
                    return handle
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)  # its writer ended and removed it meanwhile

    def _make(self) -> int | None:
        """A new file; None where another process was first."""
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        if not self._first:
            with suppress(FileExistsError):
                os.close(os.open(self.path, flags, 0o666))
            return None
        temporary, handle = locked_temporary(self.path)
        try:
            _write_all(handle, self._first)
            os.fsync(handle)
            os.link(temporary, self.path)
        except FileExistsError:
            os.close(handle)
            return None
        except OSError as error:
            if error.errno not in _NO_LINKS or os.path.lexists(self.path):
                os.close(handle)
                raise
            os.rename(temporary, self.path)  # a disk without hard links
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(self.path.parent)
        return handle

    def _lock(self, handle: int) -> None:
        try:
            lock_or_warn(handle, self.path)
        except BlockingIOError as error:
            raise UserError(
                f"{self.path}: another process is writing it; wait for it, or choose another output"
            ) from error

    def _require_ours(self, handle: int) -> None:
        begins = os.pread(handle, max(16, len(self._first)), 0)
        if begins.lstrip()[:1] == b"[":
            raise UserError(
                f"{self.path}: holds one JSON array, to which rows cannot be appended; choose "
                "another output"
            )
        if self._first and not begins_with(begins, self._first):
            raise UserError(
                f"{self.path}: is there and was not written by this command, which keeps its "
                "unfinished rows under this name; move it away, or choose another output"
            )

    def append(self, value: Any) -> None:
        """Write one row.

        Raises:
            UserError: as `append_lines`.
        """
        self.append_lines([encode_row(value)])

    def append_lines(self, lines: Sequence[bytes]) -> None:
        """Write rows that are encoded already, newlines included, all at once.

        Raises:
            UserError: the disk is full; the file then ends with the row before. Or somebody else
                changed the file.
        """
        data = b"".join(lines)
        assert self._handle is not None, f"{self.path} was closed"
        self._require_size(os.lseek(self._handle, 0, os.SEEK_END))
        with explained_os_errors(self.path, len(data)):
            try:
                _write_all(self._handle, data)
            except OSError:
                os.ftruncate(self._handle, self._size)
                raise
        self._size += len(data)
        if time.monotonic() - self._synced_at >= SYNC_EVERY_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Force what was appended to the disk.

        Raises:
            UserError: somebody else removed the file or changed its size.
        """
        if self._handle is not None:
            self._sync(self._handle)
            self._require_size(os.fstat(self._handle).st_size)
            if not is_at(self.path, self._handle):
                raise UserError(
                    f"{self.path}: was removed or replaced while it was being written; "
                    f"{_START_AGAIN}"
                )

    def _sync(self, handle: int) -> None:
        with explained_os_errors(self.path):
            os.fsync(handle)
        self._synced_at = time.monotonic()

    def _require_size(self, size: int) -> None:
        if size != self._size:
            raise UserError(
                f"{self.path}: holds {size:,} bytes where {self._size:,} were written: something "
                f"else changed it; {_START_AGAIN}"
            )

    def remove_if_bare(self) -> None:
        """Remove the file if it has no row and is still the one that was opened."""
        if self._handle is None or not is_at(self.path, self._handle):
            return
        if os.fstat(self._handle).st_size <= len(self._first):
            self.path.unlink()

    def close(self) -> None:
        if self._handle is not None:
            try:
                self._sync(self._handle)
            finally:
                os.close(self._handle)
                self._handle = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
