"""JSON Lines: rows read one at a time, and rows written as they come so that a kill loses none.

Reads `.jsonl` and `.json`, plain or gzip, JSON lines or one JSON array; how, and what counts as a
fault, stands in `rrhf.data.json_scan`. Left out on purpose: what a row must hold.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rrhf.data.json_scan import Fault, Faults, scan_rows
from rrhf.errors import UserError
from rrhf.files import PathLike, cut_torn_tail, explained_os_errors

logger = logging.getLogger(__name__)

SYNC_EVERY_RECORDS = 32
SYNC_EVERY_SECONDS = 1.0


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


def encode_row(value: Any) -> bytes:
    """A value as one line of JSON in UTF-8, newline included.

    The line marks that some readers break lines at (U+0085, U+2028, U+2029) are escaped; NaN is
    refused. Half a surrogate pair, which UTF-8 cannot hold, makes the whole row ASCII escapes.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode("ascii") + b"\n"
    for mark in ("\u0085", "\u2028", "\u2029"):
        if mark in text:
            data = data.replace(mark.encode("utf-8"), f"\\u{ord(mark):04x}".encode("ascii"))
    return data + b"\n"


class JsonlAppender:
    """Appends rows to a JSON Lines file so that a kill loses none that was handed over.

    Each row goes to the system with its own write (a killed process loses nothing), and to the disk
    every 32 rows or second (a power cut loses little). One process at a time.

    Attributes:
        path: the file, made if it is not there.
        bytes_cut: how many bytes of an unfinished last line were cut on opening.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        if self.path.name.endswith(".gz"):
            raise UserError(f"{path}: rows are appended to plain files; drop the .gz of its name")
        with explained_os_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._handle: int | None = handle
        try:
            self._lock(handle)
            if os.pread(handle, 16, 0).lstrip()[:1] == b"[":
                raise UserError(
                    f"{path}: holds one JSON array, to which rows cannot be appended; choose "
                    "another output"
                )
            self.bytes_cut = cut_torn_tail(path)
        except BaseException:
            self.close()
            raise
        self._pending = 0
        self._synced_at = time.monotonic()

    def _lock(self, handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{self.path}: another process is writing it; wait for it, or choose another output"
            ) from error
        except OSError as error:
            logger.warning("%s: this disk cannot lock files (%s); going on", self.path, error)

    def append(self, value: Any) -> None:
        """Write one row.

        Raises:
            UserError: the disk is full; the file then ends with the row before.
        """
        assert self._handle is not None, f"{self.path} was closed"
        data = encode_row(value)
        before = os.lseek(self._handle, 0, os.SEEK_END)
        try:
            with explained_os_errors(self.path, len(data)):
                rest = memoryview(data)
                while rest:
                    rest = rest[os.write(self._handle, rest) :]
        except UserError:
            os.ftruncate(self._handle, before)
            raise
        self._pending += 1
        if (
            self._pending >= SYNC_EVERY_RECORDS
            or time.monotonic() - self._synced_at >= SYNC_EVERY_SECONDS
        ):
            self.flush()

    def flush(self) -> None:
        """Force what was appended to the disk."""
        if self._handle is not None:
            with explained_os_errors(self.path):
                os.fsync(self._handle)
            self._pending = 0
            self._synced_at = time.monotonic()

    def close(self) -> None:
        if self._handle is not None:
            try:
                self.flush()
            finally:
                os.close(self._handle)
                self._handle = None

    def __enter__(self) -> JsonlAppender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
