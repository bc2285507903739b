"""Run folders: what a training leaves on disk, from its settings to its model.

The manifest is written last (as everywhere: `rrhf.manifests`), so it says whether the run is whole.
In a run over several processes one of them alone opens the run folder.

Left out on purpose: checkpoints (`rrhf.training.core.checkpoint` knows what a state is). Standard
library only.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from rrhf.errors import UserError
from rrhf.files import (
    cut_torn_tail,
    json_text,
    make_folder,
    missing_folders,
    remove_empty,
    write_json,
)
from rrhf.locks import FileLock
from rrhf.manifests import COMPLETE, UNFINISHED, manifest_path, read_manifest, write_manifest
from rrhf.os_errors import PathLike, explained_os_errors
from rrhf.staged_folders import remove_unfinished

logger = logging.getLogger(__name__)

FINISHED = "a finished"
SETTINGS_FILE = "settings.json"
"""What a run was asked to do. Not `config.json`, by which Hugging Face knows a model folder."""
_OLD_SETTINGS_FILE = "config.json"
# What may differ between the calls of one run: how it is called, and where its folder stands now.
_NOT_SETTINGS = ("resume_from_checkpoint", "output_dir", "accept_edited_files", "ddp_timeout")
_MOST_CHANGES = 10
# Folders of models that a run keeps on its way.
_KEPT = ("policies", "reward_models", "best")
_HAD = "has_checkpoints"


def settings_file(run: PathLike) -> Path | None:
    """The settings of the run in a folder; None where no run was begun there.

    Earlier versions called them config.json, as models do: that file counts where it names an
    output_dir, which no model's does.
    """
    settings, old = Path(run) / SETTINGS_FILE, Path(run) / _OLD_SETTINGS_FILE
    if settings.is_file():
        return settings
    return old if are_settings(old) else None


def are_settings(path: Path) -> bool:
    """Whether a file holds the settings of a run, rather than the config of a model."""
    if not path.is_file():
        return False
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and "output_dir" in values


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
        data = (json_text(row) + "\n").encode("utf-8", "backslashreplace")
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


def _not_ours(path: Path) -> UserError:
    return UserError(
        f"{path}: was not written by a run, which would overwrite it; move it elsewhere, or choose "
        "another --output_dir"
    )


def told_changes(changed: Sequence[tuple[str, Any, Any]]) -> str:
    """Lines of (name, value before, value now); of many, as from another command, the first."""
    lines = [f"  {name} was {was!r} and is {now!r}" for name, was, now in changed[:_MOST_CHANGES]]
    if (left_out := len(changed) - len(lines)) > 0:
        lines.append(f"  and {left_out} more: is it the run of another command?")
    return "\n".join(lines)


class RunFolder:
    """A run on disk: `settings.json`, `metrics.jsonl`, `checkpoints/`, `policy/`, `manifest.json`.

    Attributes:
        path: the output directory.
        checkpoints: the folder of resumable states.
        policy: where the trained policy goes, as a plain Hugging Face folder.
        reward_model: where a trained reward model goes.
        metrics: the log of the run.
        samples: responses of the policy on its way.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.policy = self.path / "policy"
        self.reward_model = self.path / "reward_model"
        self.metrics = MetricsLog(self.path / "metrics.jsonl")
        self.samples = MetricsLog(self.path / "samples.jsonl")
        self._lock = FileLock(self.path / ".lock")
        self._settings_path = self.path / SETTINGS_FILE
        self._made: list[Path] = []

    def finished_model(self, config: Mapping[str, Any]) -> Path | None:
        """The model's folder where a run with these settings is complete here, else None.

        Only reads, so that every process of a run may ask before one of them opens the folder.

        Raises:
            UserError: a complete run is here that had other settings; the text says which.
        """
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        if manifest is None or manifest.get("status") != COMPLETE:
            return None
        model = self.path / str(manifest.get("model_folder", self.policy.name))
        if not model.is_dir():  # it can be made again from the last checkpoint
            return None
        changed = self._changed_settings(config)
        if changed:
            raise UserError(
                f"{self.path}: holds a finished run with other settings:\n"
                + told_changes(changed)
                + "\nGive the same, or choose another --output_dir"
            )
        return model

    def open(self, config: Mapping[str, Any], resume: bool) -> None:
        """Make the folder ours, before anything slow is loaded.

        Writes `settings.json` and a manifest that says "unfinished". With `resume`, an earlier run
        in the folder is continued (settings that differ are logged); where there is none, one
        begins.

        Raises:
            UserError: another process holds the folder; it cannot be written; it holds a run and
                `resume` is off; files of the names that a run writes are not of one.
        """
        self._require_ours()
        self._made = missing_folders(self.path)
        is_locked_before = self._lock.path.exists()
        make_folder(self.path)
        try:
            self._probe()
            self._lock.acquire(f"the run folder {self.path}")
            if not resume:
                self.require_free()
            else:
                for key, was, now in self._changed_settings(config):
                    logger.warning("resuming with %s = %r, which was %r", key, now, was)
            self.checkpoints.mkdir(exist_ok=True)
            self._remove_leftovers()
            write_json(self._settings_path, config)
            had = self._has_had_checkpoints() if resume else False
            write_manifest(self.path, {"status": UNFINISHED, **({_HAD: True} if had else {})})
            if are_settings(old := self.path / _OLD_SETTINGS_FILE):
                old.unlink()
        except BaseException:
            self._lock.release()
            if not is_locked_before:
                self._lock.path.unlink(missing_ok=True)
            remove_empty([*([self.checkpoints] if self._made else []), *self._made])
            raise

    def note_checkpoint(self) -> None:
        """Remember that there is one: a run whose checkpoints are lost is not begun anew."""
        if not self._has_had_checkpoints():
            write_manifest(self.path, {"status": UNFINISHED, _HAD: True})

    def require_no_lost_checkpoints(self) -> None:
        """Where none is found on resuming, there must never have been one.

        Raises:
            UserError: there was.
        """
        if self._has_had_checkpoints():
            raise UserError(
                f"{self.checkpoints}: the run had checkpoints, and none is there any more; copy "
                "one of them back, or choose another --output_dir to train from the beginning"
            )

    def _has_had_checkpoints(self) -> bool:
        return bool((read_manifest(self.path) or {}).get(_HAD))

    def _remove_leftovers(self) -> None:
        """What killed processes of this run left half-written, under hidden names."""
        for folder in (self.path, self.checkpoints, *(self.path / name for name in _KEPT)):
            remove_unfinished(folder)
        for path in self.path.glob(".probe.*"):
            path.unlink(missing_ok=True)

    def _probe(self) -> None:
        probe = self.path / f".probe.{os.getpid()}"
        with explained_os_errors(self.path):
            try:
                probe.write_bytes(b"is this place writable?")
            finally:
                probe.unlink(missing_ok=True)

    def require_free(self) -> None:
        """Refuse a folder that holds a run already, or files that would be overwritten.

        Raises:
            UserError: it does.
        """
        self._require_ours()
        earlier = self._earlier_run()
        if earlier is None:
            return
        way = (
            "--resume_from_checkpoint would leave it as it is;"
            if earlier == FINISHED
            else "continue it with --resume_from_checkpoint, or"
        )
        raise UserError(f"{self.path}: holds {earlier} run; {way} choose another --output_dir")

    def _require_ours(self) -> None:
        """Refuse a manifest.json or settings.json that no run wrote."""
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        if manifest is not None:
            if manifest.get("status") not in (COMPLETE, UNFINISHED):
                raise _not_ours(manifest_path(self.path))
            if "files" in manifest:  # that of a sealed folder, such as a run's policy/
                raise UserError(
                    f"{self.path}: holds a model, and a run would write over its manifest.json; "
                    "name the run's own folder to go on with it, or choose another --output_dir"
                )
        elif self._settings_path.exists() and not are_settings(self._settings_path):
            raise _not_ours(self._settings_path)

    def _earlier_run(self) -> str | None:
        """ "a finished" or "an unfinished" where the folder holds a run, else None."""
        manifest = read_manifest(self.path)
        if manifest is not None and manifest.get("status") == COMPLETE:
            return FINISHED
        # Without a manifest of ours, a config.json may be a model's: such a folder is not touched.
        names = (SETTINGS_FILE, _OLD_SETTINGS_FILE)
        is_free = self.is_bare and (
            manifest is not None or not any((self.path / name).exists() for name in names)
        )
        return None if is_free else "an unfinished"

    @property
    def is_bare(self) -> bool:
        """True where no step has left anything: no metrics, no checkpoint, no model."""
        holds_states = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        has_rows = any(
            log.path.exists() and log.path.stat().st_size > 0
            for log in (self.metrics, self.samples)
        )
        left = (self.policy, self.reward_model, *(self.path / name for name in _KEPT))
        return not (holds_states or has_rows or any(path.exists() for path in left))

    def discard(self) -> None:
        """Take back what `open` wrote, after a mistake that was found before the first step."""
        assert self.is_bare, f"{self.path} holds work that must not be thrown away"
        self.metrics.close()
        self.samples.close()
        logs = (self.metrics.path, self.samples.path)
        for path in (self._settings_path, manifest_path(self.path), *logs):
            path.unlink(missing_ok=True)
        self._lock.release()
        (self.path / ".lock").unlink(missing_ok=True)
        remove_empty([self.checkpoints])
        remove_empty([self.path, *self._made[1:]])  # unless something else of the user's is in it

    def _changed_settings(self, config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(name, value before, value now) of each setting that is not what the run had."""
        place = settings_file(self.path)
        try:
            before = None if place is None else json.loads(place.read_bytes())
        except (OSError, ValueError):
            before = None
        if not isinstance(before, dict):
            return []
        now = json.loads(json_text(config))
        return [
            (key, before.get(key), now.get(key))
            for key in sorted(before.keys() | now.keys())
            if key not in _NOT_SETTINGS and before.get(key) != now.get(key)
        ]

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Say that the run is whole: the manifest, written after everything else."""
        self.metrics.sync()
        self.samples.sync()
        had = {_HAD: True} if self._has_had_checkpoints() else {}
        write_manifest(self.path, {"status": COMPLETE, **manifest, **had})

    def drop_checkpoints(self) -> None:
        """Delete them where nothing is to go on from them: none of them is lost then."""
        manifest = read_manifest(self.path)
        if manifest is not None and manifest.pop(_HAD, None):
            write_manifest(self.path, manifest)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Let go of the folder; without `finish` before, its manifest goes on saying unfinished."""
        self.metrics.close()
        self.samples.close()
        self._lock.release()
