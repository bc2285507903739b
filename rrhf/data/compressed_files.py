"""Open the bytes of data files, plain or compressed with gzip; refuse pipes and devices."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import Any, BinaryIO, cast

from rrhf.data.faults import Fault
from rrhf.errors import UserError
from rrhf.files import Digest
from rrhf.os_errors import PathLike, special_file

READ_BYTES = 1 << 18
# A gzip file that unpacks to more than both limits (bytes, and a multiple of its size) is taken for
# a decompression bomb. Texts compress to about a tenth of their size, similar rows to a hundredth.
MAX_UNPACKED_BYTES = 64 << 20
MAX_UNPACKED_RATIO = 200

_GZIP_MAGIC = b"\x1f\x8b"

UNREADABLE = (EOFError, OSError, zlib.error)
"""The exceptions that reading raises if a gzip file is cut off or damaged, or if a disk fails."""


def open_bytes(path: PathLike, digest: Digest | None = None) -> BinaryIO:
    """Open a file's bytes, decompressed if its first bytes say gzip (the name does not matter).

    Args:
        path: the file.
        digest: updated with the file's bytes as they are read from the disk, still compressed.

    Raises:
        UserError: there is no such file, it may not be read, or it is a pipe or a device.
    """
    require_plain_input(path)
    try:
        raw = _DigestedRead(path, digest)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; name a .json or .jsonl file in it") from error
    except PermissionError as error:
        raise UserError(f"{path}: may not be read; check its permissions") from error
    except OSError as error:  # a link to itself, a file where a folder should be
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    file = io.BufferedReader(raw, max(READ_BYTES, io.DEFAULT_BUFFER_SIZE))
    if file.peek(2)[:2] == _GZIP_MAGIC:
        return cast(BinaryIO, io.BufferedReader(cast(Any, _Gunzip(file))))
    return file


def require_plain_input(path: PathLike) -> None:
    """Refuse pipes and devices, such as a piped `/dev/stdin` or the shell's `<(...)`.

    Raises:
        UserError: the path leads to a pipe, a socket or a device.
    """
    if kind := special_file(path):
        raise UserError(
            f"{path}: is {kind}, and data is read more than once; write it to a file, and name "
            "that file"
        )


def is_compressed(path: PathLike) -> bool:
    """Whether the first bytes of a file say gzip."""
    with open(path, "rb") as file:
        return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


def packed_bytes(file: BinaryIO) -> BinaryIO:
    """Return a file that `open_bytes` opened without its decompression, if it has any."""
    raw: Any = cast(io.BufferedReader, file).raw
    return raw.below if isinstance(raw, _Gunzip) else file


class _DigestedRead(io.FileIO):
    """A file that is hashed while it is read from beginning to end."""

    def __init__(self, path: PathLike, digest: Digest | None) -> None:
        super().__init__(path, "rb")
        self._digest = digest

    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        if self._digest is not None and size:
            self._digest.update(memoryview(buffer)[:size])
        return size

    def seekable(self) -> bool:
        return self._digest is None


class _TooLarge(OSError):
    """Raised if a gzip file unpacks to a size out of proportion, as a decompression bomb does."""


class _Gunzip(gzip.GzipFile):
    """A gzip reader that also closes the underlying file, and stops at a decompression bomb."""

    def __init__(self, below: BinaryIO) -> None:
        super().__init__(fileobj=below, mode="rb")
        self.below = below
        self._unpacked = 0

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        self._unpacked += size
        if (
            self._unpacked > MAX_UNPACKED_BYTES
            and self._unpacked > MAX_UNPACKED_RATIO * self.below.raw.tell()  # type: ignore[attr-defined]
        ):
            raise _TooLarge
        return size

    def close(self) -> None:
        super().close()
        self.below.close()


def broken_bytes(line: int, error: Exception) -> Fault:
    """Build the fault of the line after which nothing can be read."""
    if isinstance(error, EOFError):
        return Fault(line, "the gzip file is cut off here; copy or make it again")
    if isinstance(error, _TooLarge):
        return Fault(
            line,
            f"the gzip file unpacks to more than {MAX_UNPACKED_RATIO} times its size and is not "
            "read further; if this is right, unpack it and name the unpacked file",
        )
    return Fault(line, f"cannot be read further ({error}); copy or make the file again")
