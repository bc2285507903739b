"""Run folders, manifests and metrics: what a stage leaves on disk, and how one knows it is whole.

The idea is one rule: the manifest is written last. A data file `X.json` has `X.manifest.json`
beside it, a folder has `manifest.json` inside; "status" says "complete" or "unfinished", and
whoever reads a hand-over looks there first. Every small file is written beside its place, synced
and moved over, so that a kill at any moment leaves the old file or the new one, never half of one.

Left out on purpose: checkpoints (`rrhf.training.checkpoint` knows what a state is) and the format
of data files (`rrhf.data`). In a run over several processes one of them alone opens the run folder.
Standard library only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rrhf.errors import UserError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
COMPLETE = "complete"
UNFINISHED = "unfinished"

PathLike = str | os.PathLike[str]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_LOCK_IS_HELD = (errno.EWOULDBLOCK, errno.EACCES)
_CHUNK_BYTES = 1 << 20


@contextmanager
def explained_os_errors(path: PathLike, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn a full disk, a read-only place or a missing folder into a `UserError` with the mend.

    Args:
        path: the file that is being written.
        needed_bytes: how much is about to be written, where it is known.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str):
            path = error.filename
        if error.errno in _NO_SPACE:
            free = _free_bytes(path)
            needed = "an unknown number of" if needed_bytes is None else f"{needed_bytes:,}"
            raise UserError(
                f"{path}: no space left: {needed} bytes needed, {free} bytes free there; "
                "make room, or choose an output on another disk"
            ) from error
        if error.errno in _NOT_WRITABLE:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); "
                "choose an output that you may write to"
            ) from error
        if error.errno == errno.ENOENT and not Path(path).absolute().parent.exists():
            raise UserError(f"{path}: its folder does not exist; make the folder first") from error
        if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST):
            raise UserError(
                f"{path}: {error.strerror}: a file stands where a folder is needed, or a folder "
                "where a file is; choose another path"
            ) from error
        raise


def _free_bytes(path: PathLike) -> str:
    """The free bytes of the disk that holds `path`, as text; "unknown" where it cannot be asked."""
    place = Path(path).absolute()
    for folder in (place, *place.parents):
        try:
            return f"{shutil.disk_usage(folder).free:,}"
        except OSError:
            continue
    return "unknown"


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


@contextmanager
def replaced_file(path: PathLike) -> Iterator[BinaryIO]:
    """Write a whole file atomically: yields a binary file that takes `path`'s place at the end.

    If the body raises, `path` stays as it was and the temporary file is removed. A symbolic link
    stays a link; what it points to is replaced.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with explained_os_errors(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)


def _finite(value: Any) -> Any:
    """The value with NaN and infinities as None, because JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_json(path: PathLike, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinities become null, paths text."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, default=_as_json) + "\n"
    data = text.encode("utf-8", "backslashreplace")
    with explained_os_errors(path, len(data)), replaced_file(path) as file:
        file.write(data)


def _as_json(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def sha256_file(path: PathLike) -> str:
    """The SHA-256 of a file's bytes as 64 hex digits, read in chunks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
    which still stands there, is not this file's.

    Raises:
        UserError: the manifest is there but cannot be read, or is of a newer schema.
    """
    place = manifest_path(path)
    try:
        value = json.loads(place.read_bytes())
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        return None
    except (ValueError, OSError) as error:
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
    named = value.get("file")
    if isinstance(named, str) and named != Path(path).name and (place.parent / named).exists():
        return None
    return value


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
        with explained_os_errors(self.path):
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
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
    with explained_os_errors(path), open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        tail = b""
        while end > 0:
            start = max(0, end - _CHUNK_BYTES)
            file.seek(start)
            chunk = file.read(end - start)
            newline = chunk.rfind(b"\n")
            tail = chunk[newline + 1 :] + tail
            if newline >= 0:
                break
            end = start
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


class MetricsLog:
    """metrics.jsonl: one JSON object a row, handed to the system at once, cut back on resume.

    Attributes:
        path: the file; it is made with the first row.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None

    def _open(self) -> BinaryIO:
        if self._file is None:
            if self.path.exists():
                cut_torn_tail(self.path)
            with explained_os_errors(self.path):
                self._file = open(self.path, "ab")  # noqa: SIM115
        return self._file

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; NaN and infinities become null."""
        line = json.dumps(_finite(row), ensure_ascii=False, default=_as_json) + "\n"
        data = line.encode("utf-8", "backslashreplace")
        file = self._open()
        with explained_os_errors(self.path, len(data)):
            file.write(data)
            file.flush()

    @property
    def offset(self) -> int:
        """The size in bytes of what has been written: what a checkpoint remembers."""
        if self._file is not None:
            self._file.flush()
        elif self.path.exists():
            cut_torn_tail(self.path)
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> None:
        """Force the rows to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def truncate_to(self, offset: int) -> None:
        """Forget the rows behind a remembered `offset`."""
        assert offset >= 0, f"an offset counts bytes from the start, not {offset}"
        self.close()
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < offset:
            logger.warning(
                "%s: holds %d bytes where the checkpoint saw %d: some rows are lost",
                self.path,
                size,
                offset,
            )
            return
        if size > offset:
            with open(self.path, "r+b") as file:
                file.truncate(offset)
                file.flush()
                os.fsync(file.fileno())

    def truncate_after_step(self, step: int) -> int:
        """Forget everything from the first row whose "step" is beyond `step`; returns rows dropped.

        Rows without a step that were written later belong to the same undone stretch and go too.
        """
        self.close()
        if not self.path.exists():
            return 0
        cut_torn_tail(self.path)
        keep: int | None = None
        position = dropped = 0
        with open(self.path, "rb") as file:
            for line in file:
                if keep is None and _step_of(line) > step:
                    keep = position
                if keep is not None:
                    dropped += 1
                position += len(line)
        if keep is not None:
            self.truncate_to(keep)
        return dropped

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None


def _step_of(line: bytes) -> float:
    try:
        step = json.loads(line).get("step")
    except (ValueError, AttributeError):
        return -math.inf
    return step if isinstance(step, (int, float)) else -math.inf


class RunFolder:
    """A run on disk: `config.json`, `metrics.jsonl`, `checkpoints/`, `policy/`, `manifest.json`.

    Attributes:
        path: the output directory.
        checkpoints: the folder of resumable states.
        policy: where the trained policy goes, as a plain Hugging Face folder.
        reward_model: where a trained reward model goes.
        metrics: the log of the run.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.policy = self.path / "policy"
        self.reward_model = self.path / "reward_model"
        self.metrics = MetricsLog(self.path / "metrics.jsonl")
        self._lock = FileLock(self.path / ".lock")
        self._config_path = self.path / "config.json"

    def open(self, config: Mapping[str, Any], resume: bool) -> None:
        """Make the folder ours, before anything slow is loaded.

        Writes `config.json` and a manifest that says "unfinished". With `resume`, an earlier run in
        the folder is continued (settings that differ are logged); where there is none, one begins.

        Raises:
            UserError: another process holds the folder; it cannot be written; it holds a run and
                `resume` is off.
        """
        with explained_os_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._probe()
        self._lock.acquire(f"the run folder {self.path}")
        try:
            earlier = self._earlier_run()
            if earlier is not None and not resume:
                raise UserError(
                    f"{self.path}: holds {earlier} run; continue it with --resume_from_checkpoint, "
                    "or choose another --output_dir"
                )
            if resume:
                self._log_changed_settings(config)
            self.checkpoints.mkdir(exist_ok=True)
            write_json(self._config_path, config)
            write_manifest(self.path, {"status": UNFINISHED})
        except BaseException:
            self._lock.release()
            raise

    def _probe(self) -> None:
        probe = self.path / f".probe.{os.getpid()}"
        with explained_os_errors(self.path):
            try:
                probe.write_bytes(b"is this place writable?")
            finally:
                probe.unlink(missing_ok=True)

    def _earlier_run(self) -> str | None:
        """ "a finished" or "an unfinished" where the folder holds a run, else None."""
        manifest = read_manifest(self.path)
        if manifest is not None and manifest.get("status") == COMPLETE:
            return "a finished"
        # Without a manifest of ours, a config.json may be a model's: such a folder is not touched.
        is_free = self.is_bare and (manifest is not None or not self._config_path.exists())
        return None if is_free else "an unfinished"

    @property
    def is_bare(self) -> bool:
        """True where no step has left anything: no metrics, no checkpoint, no model."""
        holds_states = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        has_rows = self.metrics.path.exists() and self.metrics.path.stat().st_size > 0
        return not (holds_states or has_rows or self.policy.exists() or self.reward_model.exists())

    def discard(self) -> None:
        """Take back what `open` wrote, after a mistake that was found before the first step."""
        assert self.is_bare, f"{self.path} holds work that must not be thrown away"
        self.metrics.close()
        for path in (self._config_path, manifest_path(self.path), self.metrics.path):
            path.unlink(missing_ok=True)
        self._lock.release()
        (self.path / ".lock").unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path):
            with suppress(OSError):  # something else of the user's is in it
                folder.rmdir()

    def _log_changed_settings(self, config: Mapping[str, Any]) -> None:
        try:
            before = json.loads(self._config_path.read_bytes())
        except (OSError, ValueError):
            return
        now = json.loads(json.dumps(_finite(config), default=_as_json))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                logger.warning(
                    "resuming with %s = %r, which was %r", key, now.get(key), before.get(key)
                )

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Say that the run is whole: the manifest, written after everything else."""
        self.metrics.sync()
        write_manifest(self.path, {"status": COMPLETE, **manifest})

    def close(self) -> None:
        """Let go of the folder; without `finish` before, its manifest goes on saying unfinished."""
        self.metrics.close()
        self._lock.release()
