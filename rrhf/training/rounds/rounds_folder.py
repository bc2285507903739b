"""The run folder of `rrhf train iterative`; a run resumes from its rounds, not from checkpoints.

This module does not import torch, so that a folder in use is reported before torch is loaded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from rrhf.errors import UserError
from rrhf.manifests import COMPLETE, UNFINISHED, read_manifest
from rrhf.runs import RunFolder, describe_changes
from rrhf.signals import StopRequest
from rrhf.training.rounds.iterative_config import IterativeConfig

_POLL_SECONDS = 0.05

# Settings that may change when a run is resumed, because they do not affect the weights.
_ADJUSTABLE = (
    "num_rounds",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "per_device_prompt_batch_size",
)


class RoundsFolder(RunFolder):
    """The folder of a run that resumes from its rounds instead of from checkpoints."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.checkpoints = self.round(1)

    def round(self, number: int) -> Path:
        """Return the folder of a round; number 0 holds the evaluation of the starting policy."""
        return self.path / f"round-{number}"

    def policy_after(self, number: int) -> Path:
        """Return the folder of the policy that a round trained."""
        return self.round(number) / "rank" / "policy"

    @property
    def is_bare(self) -> bool:
        """Whether neither the run nor a stage of its rounds has written anything yet."""
        return super().is_bare and not any(path.is_file() for path in self._of_rounds())

    def discard(self) -> None:
        """Remove what `open` wrote, and the empty folders of rounds."""
        for path in sorted(self._of_rounds(), reverse=True):
            path.rmdir()
        super().discard()

    def _of_rounds(self) -> Iterator[Path]:
        for folder in self.path.glob("round-*"):
            yield folder
            yield from folder.rglob("*")

    def has_finished(self, number: int) -> bool:
        """Whether a round's training is complete."""
        folder = self.policy_after(number)
        manifest = read_manifest(folder.parent)
        is_complete = manifest is not None and manifest.get("status") == COMPLETE
        return is_complete and folder.is_dir()

    def require_same_settings(self, config: IterativeConfig) -> None:
        """Refuse to continue with other settings, so that all rounds of a run have the same
        settings.

        Raises:
            UserError: settings differ, or num_rounds is smaller than the number of rounds done.
        """
        changed = [
            (name, was, now)
            for name, was, now in self._changed_settings(config.as_dict())
            if name not in _ADJUSTABLE
        ]
        if changed and not self.is_bare:
            raise UserError(
                f"{self.path}: its rounds were begun with other settings:\n"
                + describe_changes(changed)
                + "\nUse the same settings, or choose another --output_dir"
            )
        if self.round(config.num_rounds + 1).exists():
            raise UserError(
                f"--num_rounds {config.num_rounds}: {self.path} has begun more rounds; the policy "
                f"of that round is {self.policy_after(config.num_rounds)}"
            )

    def wait_until_open(self, config: IterativeConfig, stop: StopRequest) -> None:
        """Wait until process 0 has opened the folder.

        If this process wrote before that, process 0 would mistake the new files for an earlier run.

        Raises:
            StoppedBySignal: a signal came first.
            UserError: the folder was not opened within `ddp_timeout` seconds.
        """
        deadline = time.monotonic() + config.ddp_timeout
        while not self._is_open(config):
            stop.raise_if_received("nothing was begun")
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.path}: process 0 has not begun within {config.ddp_timeout:g} s "
                    "(--ddp_timeout); see the message of process 0"
                )
            time.sleep(_POLL_SECONDS)

    def _is_open(self, config: IterativeConfig) -> bool:
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        is_begun = manifest is not None and manifest.get("status") == UNFINISHED
        return is_begun or self.is_finished(config)  # process 0 may already have finished the run

    def is_finished(self, config: IterativeConfig) -> bool:
        """Whether all rounds are complete; called before the folder is opened."""
        manifest = read_manifest(self.path) if self.path.is_dir() else None
        return (
            manifest is not None
            and manifest.get("status") == COMPLETE
            and len(manifest.get("rounds", ())) == config.num_rounds
            and self.policy.is_dir()
        )
