"""Run folders: a training's settings, logs, checkpoints and model on disk.

The manifest says "complete" only after everything else is written (see `rrhf.manifests`). In a run
over several processes, only one of them opens the run folder.

Left out on purpose: the content of checkpoints (`rrhf.training.core.checkpoint`). Standard library
only.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.files import (
    json_object,
    json_text,
    make_folder,
    missing_folders,
    remove_empty,
    write_json,
)
from rrhf.locks import FileLock
from rrhf.manifests import COMPLETE, UNFINISHED, manifest_path, read_manifest, write_manifest
from rrhf.metrics_log import MetricsLog
from rrhf.os_errors import PathLike, explained_os_errors
from rrhf.staged_folders import remove_unfinished

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
"""The settings of a run. Not `config.json`, by which Hugging Face recognises a model folder."""
_OLD_SETTINGS_FILE = "config.json"
# Settings that may differ when a run is resumed.
_NOT_SETTINGS = ("resume_from_checkpoint", "output_dir", "accept_edited_files", "ddp_timeout")
_RENAMED = {"engine": "layout"}  # renamed in version 0.2.0
_MOST_CHANGES = 10
# Subfolders for the models that a run saves during training.
_KEPT = ("policies", "reward_models", "best")
_HAD = "has_checkpoints"


def settings_file(run: PathLike) -> Path | None:
    """Return the settings file of the run in a folder; None if no run was started there.

    Earlier versions named the file config.json, like the config of a model. A config.json counts as
    settings only if it has an output_dir, which the config of a model never has.
    """
    settings, old = Path(run) / SETTINGS_FILE, Path(run) / _OLD_SETTINGS_FILE
    if settings.is_file():
        return settings
    return old if are_settings(old) else None


def are_settings(path: Path) -> bool:
    """Whether a file holds the settings of a run, rather than the config of a model."""
    return "output_dir" in (json_object(path) or {})


def describe_changes(changed: Sequence[tuple[str, Any, Any]]) -> str:
    """List changed settings as text, at most ten; each is (name, value before, value now)."""
    lines = [f"  {name} was {was!r} and is {now!r}" for name, was, now in changed[:_MOST_CHANGES]]
    if (left_out := len(changed) - len(lines)) > 0:
        lines.append(f"  and {left_out} more: is it the run of another command?")
    return "\n".join(lines)


class RunFolder:
    """A run on disk: `settings.json`, `metrics.jsonl`, `checkpoints/`, `policy/`, `manifest.json`.

    Attributes:
        path: the output directory.
        checkpoints: the folder of resumable states.
        policy: the folder of the trained policy, a plain Hugging Face folder.
        reward_model: the folder of a trained reward model.
        metrics: the log of the run.
        samples: the log of sampled responses.
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
        """Return the model's folder if a run with these settings is complete here, else None.

        This only reads, so every process can call it before one of them opens the folder.

        Raises:
            UserError: the folder holds a complete run with other settings; the message lists them.
        """
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        if manifest is None or manifest.get("status") != COMPLETE:
            return None
        model = self.path / str(manifest.get("model_folder", self.policy.name))
        if not model.is_dir():  # the model can be made again from the last checkpoint
            return None
        changed = self._changed_settings(config)
        if changed:
            raise UserError(
                f"{self.path}: holds a finished run with other settings:\n"
                f"{describe_changes(changed)}\n"
                "Use the same settings, or choose another --output_dir"
            )
        return model

    def open(self, config: Mapping[str, Any], resume: bool) -> None:
        """Lock and prepare the folder for this run; call it before anything slow is loaded.

        Writes `settings.json` and a manifest that says "unfinished". With `resume`, an earlier run
        in the folder is continued (settings that differ are logged); if there is none, a new one is
        started.

        Raises:
            UserError: another process has locked the folder; the folder cannot be written; the
                folder holds a run and `resume` is off; or the folder holds a file that no run
                wrote, under a name that a run uses.
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
            had = self._had_checkpoints() if resume else {}
            write_manifest(self.path, {"status": UNFINISHED, **had})
            if are_settings(old := self.path / _OLD_SETTINGS_FILE):
                old.unlink()
        except BaseException:
            self._lock.release()
            if not is_locked_before:
                self._lock.path.unlink(missing_ok=True)
            remove_empty([*([self.checkpoints] if self._made else []), *self._made])
            raise

    def note_checkpoint(self) -> None:
        """Record in the manifest that the run has checkpoints (`require_no_lost_checkpoints`)."""
        if not self._had_checkpoints():
            write_manifest(self.path, {"status": UNFINISHED, _HAD: True})

    def require_no_lost_checkpoints(self) -> None:
        """Refuse to train from the beginning if the run had checkpoints and lost all of them.

        Call it only if no checkpoint was found.

        Raises:
            UserError: the run had checkpoints.
        """
        if self._had_checkpoints():
            raise UserError(
                f"{self.checkpoints}: the run had checkpoints, but none is left; copy "
                "one of them back, or choose another --output_dir to train from the beginning"
            )

    def _had_checkpoints(self) -> dict[str, bool]:
        """Return the manifest's entry for checkpoints; empty if the run never had one."""
        return {_HAD: True} if (read_manifest(self.path) or {}).get(_HAD) else {}

    def _remove_leftovers(self) -> None:
        """Remove the incomplete, hidden files that killed processes of this run left."""
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
        """Refuse a folder that already holds a run, or files that a run would overwrite.

        Raises:
            UserError: the folder is not free.
        """
        self._require_ours()
        manifest = read_manifest(self.path)
        # Without a run's manifest, a config.json may belong to a model; such a folder is refused.
        names = () if manifest is not None else (SETTINGS_FILE, _OLD_SETTINGS_FILE)
        if manifest is not None and manifest.get("status") == COMPLETE:
            found = "a finished run; --resume_from_checkpoint would leave it as it is;"
        elif not self.is_bare or any((self.path / name).exists() for name in names):
            found = "an unfinished run; continue it with --resume_from_checkpoint, or"
        else:
            return
        raise UserError(f"{self.path}: holds {found} choose another --output_dir")

    def _require_ours(self) -> None:
        """Refuse a manifest.json or settings.json that no run wrote."""
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        foreign: Path | None = None
        if manifest is None:
            if self._settings_path.exists() and not are_settings(self._settings_path):
                foreign = self._settings_path
        elif manifest.get("status") not in (COMPLETE, UNFINISHED):
            foreign = manifest_path(self.path)
        elif "files" in manifest:  # the manifest of a sealed folder, such as a run's policy/
            raise UserError(
                f"{self.path}: holds a model, and a run would overwrite its manifest.json; "
                "name the run's own folder to continue it, or choose another --output_dir"
            )
        if foreign is not None:
            raise UserError(
                f"{foreign}: was not written by a run, which would overwrite it; move it "
                "elsewhere, or choose another --output_dir"
            )

    @property
    def is_bare(self) -> bool:
        """Whether no step has written anything yet: no metrics, no checkpoint, no model."""
        holds_states = self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
        has_rows = any(
            log.path.exists() and log.path.stat().st_size > 0
            for log in (self.metrics, self.samples)
        )
        left = (self.policy, self.reward_model, *(self.path / name for name in _KEPT))
        return not (holds_states or has_rows or any(path.exists() for path in left))

    def discard(self) -> None:
        """Remove what `open` wrote, after an error before the first step."""
        assert self.is_bare, f"{self.path} holds work that must not be thrown away"
        self.metrics.close()
        self.samples.close()
        logs = (self.metrics.path, self.samples.path)
        for path in (self._settings_path, manifest_path(self.path), *logs):
            path.unlink(missing_ok=True)
        self._lock.release()
        (self.path / ".lock").unlink(missing_ok=True)
        remove_empty([self.checkpoints])
        remove_empty([self.path, *self._made[1:]])  # kept if the user has files in it

    def _changed_settings(self, config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Return (name, value before, value now) of each setting that differs from the settings
        file."""
        place = settings_file(self.path)
        before = None if place is None else json_object(place)
        if before is None:
            return []
        old = {key: new for key, new in _RENAMED.items() if new not in before}
        before = {old.get(key, key): value for key, value in before.items()}
        now = json.loads(json_text(config))
        return [
            (key, before.get(key), now.get(key))
            for key in sorted(before.keys() | now.keys())
            if key not in _NOT_SETTINGS and before.get(key) != now.get(key)
        ]

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest that marks the run as complete; call it after everything else."""
        self.metrics.sync()
        self.samples.sync()
        write_manifest(self.path, {"status": COMPLETE, **manifest, **self._had_checkpoints()})

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints on purpose, so that they do not count as lost."""
        manifest = read_manifest(self.path)
        if manifest is not None and manifest.pop(_HAD, None):
            write_manifest(self.path, manifest)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def close(self) -> None:
        """Unlock the folder. Unless `finish` was called, the manifest still says "unfinished"."""
        self.metrics.close()
        self.samples.close()
        self._lock.release()
