"""Writes files so that they are complete or absent.

A small file is written under a temporary name, synced and renamed, so that a kill at any moment
leaves either the old or the new file (`replaced_file`). Bytes are counted and hashed while they are
written, so that a manifest can record them (`rrhf.manifests`). The incomplete last line of a killed
writer is cut off (`cut_torn_tail`).

Left out on purpose: the format of data files (`rrhf.data`) and run folders (`rrhf.runs`). Standard
library only.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.locks import is_at, try_lock
from rrhf.os_errors import (
    NO_SPACE,
    PathLike,
    explained_os_errors,
    no_space,
    require_plain_output,
    special_file,
)

logger = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 20
_WRITE_BYTES = 1 << 18


def with_home_folder(path: PathLike) -> Path:
    """Return a path with its `~` or `~name` replaced by the home folder.

    Raises:
        UserError: there is neither a user nor a file of that name.
    """
    text = os.fspath(path)
    found = Path(os.path.expanduser(text))
    if found.parts and found.parts[0].startswith("~") and not found.exists():
        raise UserError(
            f"{text}: {found.parts[0]} is not a home folder here; write the whole path, or "
            f"./{text} if the name itself begins with ~"
        )
    return found


def is_same_file(one: PathLike, other: PathLike) -> bool:
    """Whether two paths, with links resolved, lead to the same file; the file may be missing."""
    first, second = (Path(path).expanduser() for path in (one, other))
    try:
        return os.path.samefile(first, second)
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)


def make_folder(path: PathLike) -> None:
    """Make a folder and its parents, if they are missing.

    Raises:
        UserError: the folder cannot be made; see `explained_os_errors`.
    """
    with explained_os_errors(path):
        os.makedirs(path, exist_ok=True)


def missing_folders(path: PathLike) -> list[Path]:
    """Return the folder and those of its parents that do not exist, innermost first."""
    folder = Path(path)
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[PathLike]) -> None:
    """Remove empty folders in the given order; stop at the first that cannot be removed."""
    with suppress(OSError):
        for folder in folders:
            os.rmdir(folder)


@contextmanager
def made_folder(path: PathLike) -> Iterator[None]:
    """Context manager: make a folder; if the body raises, remove the new folders that are empty.

    Raises:
        UserError: the folder cannot be made; see `explained_os_errors`.
    """
    with explained_os_errors(path):
        made = missing_folders(path)
    try:
        make_folder(path)
        yield
    except BaseException:
        remove_empty(made)
        raise


def sync_folder(path: PathLike) -> None:
    """Sync a folder, so that renamed and removed files in it survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


class Digest:
    """Counts and hashes bytes.

    Attributes:
        num_bytes: the number of bytes so far.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        self.num_bytes += len(data)
        self._sha256.update(data)

    def hexdigest(self) -> str:
        """Return the SHA-256 so far, as 64 hex digits."""
        return self._sha256.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the size and the SHA-256, as a manifest records them."""
        return {"bytes": self.num_bytes, "sha256": self.hexdigest()}


class _DigestedFile(io.FileIO):
    """A file that is written from start to end and hashed as it is written."""

    def __init__(self, handle: int) -> None:
        super().__init__(handle, "wb")
        self.digest = Digest()

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.digest.update(memoryview(data)[:written])
        return written

    def seekable(self) -> bool:
        return False


class DigestedWriter(io.BufferedWriter):
    """A buffered binary file that keeps the digest of the bytes written to it.

    Attributes:
        digest: covers the bytes flushed so far; covers all bytes once the file is closed.
    """

    def __init__(self, handle: int) -> None:
        raw = _DigestedFile(handle)
        super().__init__(raw, _WRITE_BYTES)
        self.digest = raw.digest

    def sync(self) -> None:
        """Sync the file to disk, so that a full disk raises an error now."""
        self.flush()
        os.fsync(self.fileno())


@contextmanager
def replaced_file(path: PathLike, needed_bytes: int | None = None) -> Iterator[DigestedWriter]:
    """Context manager: open a new binary file that replaces `path` atomically at the end.

    If the body raises, `path` is unchanged and the temporary file is removed; the temporary file of
    a killed process is removed by the next writer of the same path. A symbolic link stays a link;
    the file that it points to is replaced.

    Args:
        path: the file.
        needed_bytes: its size, if known.

    Raises:
        UserError: `path` cannot be written (see `explained_os_errors`; free space is measured
            after the temporary file is removed), or is a pipe, a socket or a device.
    """
    require_plain_output(path)
    with explained_os_errors(path):
        target = Path(os.path.realpath(path))
        remove_abandoned(target)
        temporary, handle = locked_temporary(target)
        file = DigestedWriter(handle)
        try:
            with file:
                yield file
                file.sync()
                os.replace(temporary, target)  # still locked, so `remove_abandoned` spares it
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise no_space(path, needed_bytes, file.digest.num_bytes) from error
            raise
        sync_folder(target.parent)


def locked_temporary(target: Path) -> tuple[Path, int]:
    """Return a new temporary file next to `target` and its handle, locked if the disk
    supports it."""
    while True:
        name = f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        temporary = target.with_name(name)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        handle = os.open(temporary, flags, 0o666)
        if not try_lock(handle) or is_at(temporary, handle):
            return temporary, handle
        os.close(handle)  # another process removed the file before it was locked


def remove_abandoned(target: PathLike) -> None:
    """Remove the temporary files of killed writers next to a target of `replaced_file`."""
    target = Path(target)
    for path in target.parent.glob(f".{escape(target.name)}.*.tmp"):
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # already removed, a link, or owned by another user
            continue
        try:
            if try_lock(handle) and is_at(path, handle):
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, because JSON cannot hold them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON: NaN and infinities become null, paths strings, and sets sorted
    lists."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, default=_as_json)


def write_json(path: PathLike, value: Any) -> None:
    """Write a value as indented JSON (`json_text`), atomically."""
    data = (json_text(value, indent=2) + "\n").encode("utf-8", "backslashreplace")
    with replaced_file(path, len(data)) as file:
        file.write(data)


def _as_json(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


class RepeatedKey(ValueError):
    """A JSON object has a key twice, so that one of the two values would be lost."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object; for `json.loads(..., object_pairs_hook=unique_keys)`.

    Raises:
        RepeatedKey: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise RepeatedKey(f"the key {twice!r:.60} occurs twice in one object")
    return found


def json_object(path: PathLike) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if the file is missing or holds something else."""
    try:
        value = None if special_file(path) else json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def require_unpacked_output(output_file: str) -> None:
    """Refuse a name that ends in .gz, for a file that is written row by row.

    Raises:
        UserError: the name ends in .gz.
    """
    if output_file.endswith(".gz"):
        raise UserError(
            f"output_file {output_file}: is written row by row, so it cannot be gzip; drop the "
            ".gz of its name"
        )


def sha256_file(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits, read in chunks."""
    return file_digest(path).hexdigest()


def file_digest(path: PathLike) -> Digest:
    """Return the digest of a file's bytes, read in chunks."""
    digest = Digest()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest


def cut_file(path: PathLike, size: int) -> None:
    """Truncate a file to its first `size` bytes, and sync it."""
    with open(path, "r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())


def cut_torn_tail(path: PathLike) -> int:
    """Cut off the incomplete last line that a killed writer left; return the bytes removed.

    If the last line is a complete JSON object without a newline, it is kept and the newline added.
    """
    require_plain_output(path)
    with explained_os_errors(path), open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail = b""
        while b"\n" not in tail and len(tail) < size:
            length = min(size, max(_CHUNK_BYTES, 2 * len(tail)))
            file.seek(size - length)
            tail = file.read(length)
        tail = tail[tail.rfind(b"\n") + 1 :]
        if not tail:
            return 0
        is_whole = False
        with suppress(ValueError, RecursionError):
            is_whole = isinstance(json.loads(tail), dict)
        if is_whole:
            file.seek(size)
            file.write(b"\n")
            return 0
        cut_file(path, size - len(tail))
    logger.warning("%s: cut %d bytes of a line that was never finished", path, len(tail))
    return len(tail)
