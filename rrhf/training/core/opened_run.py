"""Holds what the training loop needs to know about a run: settings, folder, ranks, signals."""

from __future__ import annotations

import contextlib
from dataclasses import KW_ONLY, dataclass, field

from rrhf.runs import RunFolder
from rrhf.signals import StopRequest
from rrhf.training.core.config import TrainingConfig
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.phases import Phases


@dataclass(frozen=True)
class OpenedRun:
    """A run whose folder is open.

    Attributes:
        config: the settings of the run.
        run: the run folder, opened by the main rank.
        parallel: ranks, and how weights are spread over them.
        stop: records signals, so that a stream or an evaluation can check for them. A stream or an
            evaluation that has changed nothing yet may raise `StoppedBySignal`, on all ranks.
        held: signals are also recorded after the last step, until this stack is closed; None =
            signals are recorded only during the training loop.
        phases: measures time and memory; each step is the phase "train", and the figures are added
            to the step's metrics. None = nothing is measured.
    """

    config: TrainingConfig
    run: RunFolder
    parallel: Parallel
    _: KW_ONLY
    stop: StopRequest = field(default_factory=StopRequest)
    held: contextlib.ExitStack | None = None
    phases: Phases | None = None
