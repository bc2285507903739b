"""Files that are whole or not there, and the manifests that vouch for them.

The idea is one rule: the manifest is written last. A data file `X.json` has `X.manifest.json`
next to it, a folder has `manifest.json` inside; "status" says "complete" or "unfinished", and
whoever reads a hand-over looks there first. Every small file is written next to its place, synced
and moved over, so that a kill at any moment leaves the old file or the new one, never half of one.
A file that is written as it goes has one writer (`FileLock`), and what a killed one left of a line
is cut (`cut_torn_tail`). Bytes are counted and hashed while they are written, so that a manifest
can say which ones it vouches for (`rrhf.seals`).

Left out on purpose: the format of data files (`rrhf.data`) and run folders (`rrhf.runs`). Standard
library only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from rrhf.errors import UserError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
COMPLETE = "complete"
UNFINISHED = "unfinished"

PathLike = str | os.PathLike[str]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_WRONG_KIND = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY)
_FIXES = {
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "choose an output that you may write to"
    ),
    **dict.fromkeys(
        _WRONG_KIND,
        "a file stands where a folder is needed, or a folder where a file is; choose another path",
    ),
    errno.ELOOP: "is a symbolic link, and what it points to must not be written; remove the link, "
    "or choose another output",
    errno.ENAMETOOLONG: "choose a shorter name: temporary files next to it have a longer one",
    errno.EMFILE: "this process may not open more files; raise its limit (ulimit -n)",
    errno.ENFILE: "this machine may not open more files; end other programs",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
        "check the disk, or choose an output on another one",
    ),
    errno.EFBIG: "a file may not grow so large there (ulimit -f, or the disk's own limit); choose "
    "an output on another disk",
    **dict.fromkeys((errno.EBUSY, errno.ETXTBSY), "end the program that uses it"),
    **dict.fromkeys(
        (errno.EINVAL, errno.ENOTSUP), "its disk takes no such file or name; choose another output"
    ),
}
_TEMPORARY = re.compile(r"\.(.+)\.\d+\.[0-9a-f]{8}\.tmp", re.DOTALL)
_NO_WORKING_FOLDER = (
    "the folder that this was started in does not exist any more; start it elsewhere"
)
_OPEN_STREAM = re.compile(r"/dev/std(in|out|err)|(/dev|/proc/[^/]+)/fd/\d+")
_LOCK_IS_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_CHUNK_BYTES = 1 << 20
_WRITE_BYTES = 1 << 18


def with_home_folder(path: PathLike) -> Path:
    """A path with the home folder in place of its `~` or `~name`.

    Raises:
        UserError: nobody here has that name, and no file has it either.
    """
    text = os.fspath(path)
    found = Path(os.path.expanduser(text))
    if found.parts and found.parts[0].startswith("~") and not found.exists():
        raise UserError(
            f"{text}: {found.parts[0]} is no home folder here; give the whole path, or ./{text} "
            "where the name itself begins with ~"
        )
    return found


@contextmanager
def explained_os_errors(path: PathLike, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn the system's refusal to write somewhere into a `UserError` with the fix.

    Errors that have nothing to do with files pass through.

    Args:
        path: the file that is being written.
        needed_bytes: how much is about to be written, where it is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            needed = "an unknown number of" if needed_bytes is None else f"{needed_bytes:,}"
            raise _no_space(path, needed) from error
        if error.errno != errno.ENOENT and error.errno not in _FIXES:
            raise
        named = error.filename if isinstance(error.filename, str) else os.fspath(path)
        raise UserError(_refusal(os.fspath(path), _without_temporary(named), error)) from error


def _refusal(given: str, path: str, error: OSError) -> str:
    """The message for a path that the system refuses; `given` is what was asked for."""
    for link in (given, path):
        if os.path.islink(link) and not os.path.exists(link):
            return (
                f"{link}: is a symbolic link that leads nowhere (to {os.readlink(link)}); remove "
                "the link, or choose another output"
            )
    if error.errno == errno.ENOENT:
        if not _has_working_folder():
            return _NO_WORKING_FOLDER
        if not os.path.exists(os.path.dirname(os.path.abspath(path))):
            return f"{path}: its folder does not exist; make the folder first"
        return (
            f"{path}: cannot be written ({error.strerror}): its folder takes no new files, or "
            "something removed it meanwhile; choose another output"
        )
    if error.errno == errno.ELOOP:
        return f"{path}: {_FIXES[errno.ELOOP]}"
    if error.errno in _WRONG_KIND:
        return f"{path}: {error.strerror}: {_FIXES[error.errno]}"
    return f"{path}: cannot be written ({error.strerror}); {_FIXES[error.errno or 0]}"


def require_working_folder() -> None:
    """Refuse to work where relative paths mean nothing.

    Raises:
        UserError: the folder that the process was started in is removed.
    """
    if not _has_working_folder():
        raise UserError(_NO_WORKING_FOLDER)


def _has_working_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _without_temporary(path: str) -> str:
    """The path that a temporary file is made for; any other path as it is."""
    folder, name = os.path.split(path)
    found = _TEMPORARY.fullmatch(name)
    return os.path.join(folder, found.group(1)) if found else path


def special_file(path: PathLike) -> str | None:
    """The kind of a pipe, socket or device, such as "a pipe"; None of a file or folder, or nothing.

    Links are followed.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return None
    kinds = {
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode))


def require_plain_output(path: PathLike) -> None:
    """Refuse to write over a pipe, a socket, a device, or what a process has open (`/dev/stdout`).

    Raises:
        UserError: one of them stands there.
    """
    kind = special_file(path)
    if kind is None and _OPEN_STREAM.fullmatch(os.fspath(path)):
        kind = "an open stream"
    if kind:
        raise UserError(
            f"{path}: is {kind}, where only a file can be written; remove it, or choose another "
            "output"
        )


def _no_space(path: PathLike, needed: str) -> UserError:
    """The disk is full. Ask after everything that was written in vain is removed."""
    return UserError(
        f"{path}: no space left: {needed} bytes needed, {_free_bytes(path)} bytes free there; "
        "make room, or choose an output on another disk"
    )


def _free_bytes(path: PathLike) -> str:
    """The free bytes of the disk that holds `path`, as text; "unknown" where it cannot be asked."""
    place = Path(os.path.realpath(path)) if _has_working_folder() else Path(path)
    for folder in (place, *place.parents):
        try:
            return f"{shutil.disk_usage(folder).free:,}"
        except OSError:
            continue
    return "unknown"


def make_folder(path: PathLike) -> None:
    """Make a folder and those above it, where they are not there yet.

    Raises:
        UserError: as `explained_os_errors`.
    """
    with explained_os_errors(path):
        os.makedirs(path, exist_ok=True)


def missing_folders(path: PathLike) -> list[Path]:
    """A folder and those above it that are not there, the innermost first."""
    folder = Path(path)
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: Iterable[PathLike]) -> None:
    """Remove folders in this order, up to the first that is not empty or not there."""
    with suppress(OSError):
        for folder in folders:
            os.rmdir(folder)


@contextmanager
def made_folder(path: PathLike) -> Iterator[None]:
    """Make a folder to work in; where the work ends in an error, take back what is empty of it.

    Raises:
        UserError: as `explained_os_errors`.
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
    """Make the names in a folder (a file that was just moved in or removed) outlive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


class Digest:
    """Counts bytes and hashes them as they pass.

    Attributes:
        num_bytes: how many have passed.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        self.num_bytes += len(data)
        self._sha256.update(data)

    def hexdigest(self) -> str:
        """The SHA-256 so far, as 64 hex digits."""
        return self._sha256.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """What a manifest says of a file with these bytes."""
        return {"bytes": self.num_bytes, "sha256": self.hexdigest()}


class _DigestedFile(io.FileIO):
    """A file that is written from its beginning to its end, hashed on the way."""

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
    """A buffered binary file that knows the digest of what was written to it.

    Attributes:
        digest: of the bytes that have left the buffer: of all of them once the file is closed.
    """

    def __init__(self, handle: int) -> None:
        raw = _DigestedFile(handle)
        super().__init__(raw, _WRITE_BYTES)
        self.digest = raw.digest

    def sync(self) -> None:
        """Force what was written to the disk: from here on it cannot lack space."""
        self.flush()
        os.fsync(self.fileno())


@contextmanager
def replaced_file(path: PathLike, needed_bytes: int | None = None) -> Iterator[DigestedWriter]:
    """Write a whole file atomically: yields a binary file that takes `path`'s place at the end.

    If the body raises, `path` stays as it was and the temporary file is removed; one that a killed
    process left is removed by the next writer of the same path. A symbolic link stays a link; what
    it points to is replaced.

    Args:
        path: the file.
        needed_bytes: its size, where it is known.

    Raises:
        UserError: as `explained_os_errors`, where the free space is measured without the temporary
            file; or a pipe, a socket or a device stands there.
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
                os.replace(temporary, target)  # still locked: nobody takes it for abandoned
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _NO_SPACE:
                least = f"more than {file.digest.num_bytes:,}"
                needed = least if needed_bytes is None else f"{needed_bytes:,}"
                raise _no_space(path, needed) from error
            raise
        sync_folder(target.parent)


def locked_temporary(target: Path) -> tuple[Path, int]:
    """A new file next to `target` and its handle, which holds its lock where the disk has locks."""
    while True:
        name = f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        temporary = target.with_name(name)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        handle = os.open(temporary, flags, 0o666)
        if not try_lock(handle) or is_at(temporary, handle):
            return temporary, handle
        os.close(handle)  # taken for abandoned before it was locked


def remove_abandoned(target: PathLike) -> None:
    """Remove temporary files of `replaced_file` next to a target whose writers were killed."""
    target = Path(target)
    for path in target.parent.glob(f".{escape(target.name)}.*.tmp"):
        try:
            handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except OSError:  # gone meanwhile, a link, or somebody else's
            continue
        try:
            if try_lock(handle) and is_at(path, handle):
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def try_lock(handle: int) -> bool:
    """Lock an open file; False where another process has the lock, or the disk knows none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_at(path: PathLike, handle: int) -> bool:
    """Whether an open file stands under this name still."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino)


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as None, because JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON; NaN and infinities become null, paths text, sets sorted lists."""
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


def sha256_file(path: PathLike) -> str:
    """The SHA-256 of a file's bytes as 64 hex digits, read in chunks."""
    return file_digest(path).hexdigest()


def file_digest(path: PathLike) -> Digest:
    """The digest of a file's bytes, read in chunks."""
    digest = Digest()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest


def manifest_path(data_path: PathLike) -> Path:
    """Where the manifest of a data file or a folder stands.

    `X.json`, `X.jsonl`, `X.jsonl.gz` -> `X.manifest.json`; a folder -> `folder/manifest.json`.
    """
    path = Path(data_path)
    if path.is_dir():
        return path / "manifest.json"
    name = path.name.removesuffix(".gz")
    for suffix in (".jsonl", ".json"):
        if name.endswith(suffix) and name != suffix:
            name = name.removesuffix(suffix)
            break
    return path.with_name(f"{name}.manifest.json")


def write_manifest(path: PathLike, value: Mapping[str, Any]) -> None:
    """Write the manifest of a data file or folder, after everything that it vouches for.

    Args:
        path: the data file or the folder (not the manifest's own path).
        value: what is to be known; "status" must be given, "schema_version" and, for a data file,
            its name are added.
    """
    assert value.get("status") in (COMPLETE, UNFINISHED), (
        f"a manifest says complete or unfinished, not {value.get('status')!r}"
    )
    manifest: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "status": value["status"]}
    if not Path(path).is_dir():
        manifest["file"] = Path(path).name
    manifest.update(value)
    write_json(manifest_path(path), manifest)


def read_manifest(path: PathLike) -> dict[str, Any] | None:
    """The manifest of a data file or folder; None where there is none.

    `X.json` and `X.jsonl` share the place of their manifest, so one that names the other file,
    which still stands there or is being made, is not this file's.

    Raises:
        UserError: the manifest is there but cannot be read, or is of a newer schema.
    """
    place = manifest_path(path)
    try:
        value = json.loads(manifest_bytes(place))
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{place}: is not a readable manifest ({error}); make the data again, or remove the "
            "manifest if you know that the data is whole"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{place}: a manifest is a JSON object, this is a {type(value).__name__}")
    version = value.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UserError(
            f"{place}: schema_version {version!r} is newer than {SCHEMA_VERSION}, which this "
            "version reads; update rrhf"
        )
    return None if _is_of_another_file(path, value) else value


def manifest_bytes(place: Path) -> bytes:
    """What stands in a manifest's place.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe, which nobody waits for, or the like.
    """
    if kind := special_file(place):
        raise ValueError(f"it is {kind}")
    return place.read_bytes()


def _is_of_another_file(path: PathLike, manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest in the place of this file's is another's, not renamed with its file."""
    named = manifest.get("file")
    if not isinstance(named, str) or named == Path(path).name:
        return False
    is_being_made = manifest.get("status") == UNFINISHED
    return is_being_made or manifest_path(path).with_name(named).exists()


def manifest_owner(path: PathLike) -> str | None:
    """The name of another file whose manifest stands where this file's would; None without one."""
    manifest = _standing_manifest(manifest_path(path))
    return manifest["file"] if _is_of_another_file(path, manifest) else None


def _standing_manifest(place: Path) -> dict[str, Any]:
    """What stands in a manifest's place, whatever it says; empty where that is no object."""
    try:
        value = json.loads(manifest_bytes(place))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def require_own_manifest_place(path: PathLike) -> None:
    """Refuse an output whose manifest would stand where that of another file does.

    An output whose manifest stands there already may be gone on with.

    Raises:
        UserError: there is another file, `X.jsonl` next to `X.json`, or one is being made.
    """
    target = Path(path)
    place = manifest_path(target)
    if _standing_manifest(place).get("file") == target.name:
        return
    stem = place.name.removesuffix(".manifest.json")
    names = [stem + suffix for suffix in ("", ".json", ".jsonl", ".json.gz", ".jsonl.gz")]
    others = [n for n in names if n != target.name and target.with_name(n).is_file()]
    if owner := manifest_owner(target):
        others.insert(0, owner)
    if others:
        suffix = target.name.removeprefix(stem)
        raise UserError(
            f"{path}: its manifest would be {place.name}, which belongs to {others[0]} next to it; "
            f"choose another name, such as {stem}-2{suffix}"
        )


def is_same_file(one: PathLike, other: PathLike) -> bool:
    """Whether two paths mean the same file, links and spellings resolved; it may be missing."""
    first, second = (Path(path).expanduser() for path in (one, other))
    try:
        return os.path.samefile(first, second)
    except OSError:
        return os.path.realpath(first) == os.path.realpath(second)


def forget_manifest(path: PathLike) -> None:
    """Remove the manifest of a data file that is about to be replaced.

    Raises:
        UserError: what stands there is no manifest, but somebody else's file.
    """
    place = manifest_path(path)
    require_plain_output(place)
    try:
        value = json.loads(manifest_bytes(place))
    except FileNotFoundError:
        return
    except (ValueError, RecursionError):  # half of a manifest
        value = {"status": UNFINISHED}
    if not isinstance(value, dict) or value.get("status") not in (COMPLETE, UNFINISHED):
        raise UserError(
            f"{place}: is there and is no manifest of this toolkit, which would write one under "
            "this name; move it away, or choose another output"
        )
    place.unlink(missing_ok=True)


class FileLock:
    """Holds a file for one process at a time (flock), until the process ends, however it ends."""

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._handle: int | None = None

    def acquire(self, what: str) -> None:
        """Take the lock at once, or raise a `UserError` naming the process and host that hold it.

        Args:
            what: what is locked, as the message names it, such as "the run folder runs/a".
        """
        assert self._handle is None, f"{self.path} is locked by this object already"
        require_plain_output(self.path)
        with explained_os_errors(self.path):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _describe_holder(os.pread(handle, 4096, 0))
            os.close(handle)
            if error.errno in _LOCK_IS_HELD:
                raise UserError(
                    f"{what} is in use by {holder}; wait for it, stop it, or choose another output"
                ) from error
            logger.warning("%s: this disk cannot lock files (%s); going on unlocked", what, error)
            return
        holder_row = {"pid": os.getpid(), "host": socket.gethostname(), "since": int(time.time())}
        os.ftruncate(handle, 0)
        with explained_os_errors(self.path):
            os.pwrite(handle, json.dumps(holder_row).encode("ascii"), 0)
        self._handle = handle

    def release(self) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            # Unlocked by name, because a forked worker may hold the same open file.
            fcntl.flock(self._handle, fcntl.LOCK_UN)
            os.close(self._handle)
            self._handle = None


def _describe_holder(data: bytes) -> str:
    try:
        row = json.loads(data)
        return f"process {row['pid']} on host {row['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def cut_torn_tail(path: PathLike) -> int:
    """Cut the bytes after the last newline of a file that a killed writer left; returns how many.

    A last line that lacks only its newline (a whole JSON object) is kept and gets its newline.
    """
    require_plain_output(path)
    with explained_os_errors(path), open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        pieces: list[bytes] = []  # of the last line, the last one first
        while end > 0:
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            chunk = file.read(end - start)
            newline = chunk.rfind(b"\n")
            pieces.append(chunk[newline + 1 :])
            if newline >= 0:
                break
            end = start
        tail = b"".join(reversed(pieces))
        if not tail:
            return 0
        if _is_whole_object(tail):
            file.seek(size)
            file.write(b"\n")
            return 0
        file.truncate(size - len(tail))
        file.flush()
        os.fsync(file.fileno())
    logger.warning("%s: cut %d bytes of a line that was never finished", path, len(tail))
    return len(tail)


def _is_whole_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False
