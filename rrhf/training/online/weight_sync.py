"""Keeps an engine in another process in step with the policy in training.

Before the responses of a rollout are drawn, the main rank writes the policy's weights into a folder
and lets the engine load and check them, while the other ranks wait. After the responses are drawn,
it checks that the engine still has them. If anything fails, the responses of all ranks are dropped,
and the work is repeated with the same seeds: weights are written again, because a restarted server
has those that it was started with. Nothing that an engine drew with other weights is returned.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.errors import LostRank, Resumable, StoppedBySignal, UserError
from rrhf.generation.engine import (
    EngineFault,
    Sample,
    SamplingParams,
    SyncedEngine,
    answers,
    engine_name,
)
from rrhf.models.untied import output_layer, write_untied_folder
from rrhf.os_errors import explained_os_errors
from rrhf.records import CandidateSet
from rrhf.signals import StopRequest
from rrhf.training.core.parallel import Parallel

logger = logging.getLogger(__name__)


class LostSampler(Resumable):
    """The engine failed too often; a checkpoint is written before the run ends."""


class WeightSync:
    """Draws responses with the policy's current weights from an engine in another process.

    Args:
        engine: the engine.
        model: the Hugging Face model of the policy in training, whole on this rank.
        temperature: the sampling temperature.
        folder: the run folder.
        parallel: the ranks.
        stop: records signals.

    Raises:
        UserError: the model's output layer cannot be given to a server.

    Attributes:
        measures: of the last rollout, for the metrics log.
    """

    def __init__(
        self,
        engine: SyncedEngine,
        model: Any,
        temperature: float,
        folder: Path,
        parallel: Parallel,
        stop: StopRequest,
    ) -> None:
        output_layer(model)
        self._engine, self._model, self._temperature = engine, model, temperature
        # Several runs may pass weights through one folder.
        own = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        self._folder = (engine.sync_folder() or folder) / f".for-the-sampler-{own}"
        if parallel.is_main:  # of a killed run
            shutil.rmtree(self._folder, ignore_errors=True)
        self._parallel, self._stop = parallel, stop
        self.measures: dict[str, float] = {}

    def answers(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> list[list[Sample]]:
        """Draw the samples of this rank's prompts; every rank must call it.

        Raises:
            LostSampler: the engine failed too often; raised on all ranks.
            StoppedBySignal: a rank received a signal; raised on all ranks.
        """
        name = engine_name(self._engine)
        for left in range(self._engine.retries, -1, -1):
            found: list[list[Sample]] = []
            draw = partial(self._draw, found, prompts, params)
            fault = (
                self._fault_of(self._sync, on_main=True)
                or self._fault_of(draw)
                or self._fault_of(self._engine.require_same, on_main=True)
            )
            if fault is None:
                self.measures["sampler_redraws"] = float(self._engine.retries - left)
                return found
            if not left:
                break
            if self._parallel.is_main:
                logger.warning("engine %s: %s; the rollout is drawn again", name, fault)
            self._fault_of(self._engine.wait, on_main=True)
        raise LostSampler(
            f"engine {name}: {fault}; the rollout was begun {self._engine.retries + 1} times and "
            "is dropped. When the engine works again, continue with --resume_from_checkpoint"
        )

    def require_close(self, mean: float, largest: float) -> None:
        """Log how far the engine's log-probs of responses are from the policy's; refuse them if
        that is too far. All ranks must call it with the same values.

        Args:
            mean: absolute difference, nats per token.
            largest: of a token.

        Raises:
            LostSampler: the mean is above the engine's bound.
        """
        self.measures |= {"sampler_gap_mean": mean, "sampler_gap_max": largest}
        if not mean <= self._engine.bound:
            raise LostSampler(
                f"engine {engine_name(self._engine)}: the log-probs of its responses differ from "
                f"the policy's by {mean:.3g} nats a token, more than {self._engine.bound:g}, so "
                "they are not trained on; see the engine's own log, and continue with "
                "--resume_from_checkpoint"
            )

    def _fault_of(self, work: Callable[[], None], on_main: bool = False) -> str | None:
        """Do work on the main rank or on all; return a fault of any rank, on all ranks.

        Raises:
            StoppedBySignal: a rank received a signal; raised on all ranks.
            LostSampler: the work cannot be done, and repeating it would not help; on all ranks.
            LostRank: the work failed on another rank in a way that is not foreseen; on that rank,
                what it raised.
        """
        fault, refusal, crash = "", "", None  # crash: what no message was foreseen for
        if self._parallel.is_main or not on_main:
            try:
                self._stop.run(work, "the rollout is dropped")
            except EngineFault as found:
                fault = str(found) or repr(found)
            except (UserError, OSError) as found:
                refusal = str(found)
            except StoppedBySignal:
                pass  # told to all ranks below
            except Exception as found:  # the other ranks must not wait for this one
                crash = found
        told = self._parallel.gather([(fault, refusal, repr(crash) if crash else "")])
        code = int(self._parallel.max(self._stop.exit_code))
        if crash is not None:
            raise crash
        if lost := next((one for _, _, one in told if one), ""):
            raise LostRank(f"another process failed: {lost}")
        if code:
            raise StoppedBySignal(code, "the rollout was dropped")
        for _, one, _ in told:
            if one:
                raise LostSampler(f"{one}; then continue with --resume_from_checkpoint")
        return next((one for one, _, _ in told if one), None)

    def _draw(
        self,
        found: list[list[Sample]],
        prompts: Sequence[CandidateSet],
        params: SamplingParams,
    ) -> None:
        found[:] = answers(self._engine, prompts, params)

    def _sync(self) -> None:
        """Write the weights, and let the engine load them; on the main rank alone."""
        started = time.monotonic()
        target = self._folder / "policy"
        with explained_os_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            write_untied_folder(target, self._model, self._temperature)
            written = time.monotonic()
            differences = self._engine.load(target)
        finally:  # they are as large as a checkpoint, and useless to a resumed run
            shutil.rmtree(self._folder, ignore_errors=True)
        self.measures = {
            "seconds_sync": time.monotonic() - started,
            "seconds_sync_write": written - started,
            **{f"canary_gap_{name}": value for name, value in differences.items()},
        }
