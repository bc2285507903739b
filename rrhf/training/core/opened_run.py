"""An opened run, as the loop needs it: settings, folder, ranks, and signals."""

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
        config: its settings.
        run: the run folder, held by the main rank.
        parallel: ranks, and how weights are spread over them.
        stop: records signals, for a stream or an evaluation that checks for them. These may raise
            `StoppedBySignal`, on all ranks, as long as they have changed nothing.
        held: signals are recorded after the steps too, until it is closed; None = they are not.
        phases: measures time and memory; each step is the phase "train", and the figures are added
            to the step's row.
    """

    config: TrainingConfig
    run: RunFolder
    parallel: Parallel
    _: KW_ONLY
    stop: StopRequest = field(default_factory=StopRequest)
    held: contextlib.ExitStack | None = None
    phases: Phases | None = None
