"""What the loop works in: a run's settings and folder, its ranks, and what watches for signals."""

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
        stop: notes the signals that come, for a stream or an evaluation that watches for them.
            They may raise `StoppedBySignal`, on all ranks, where they have changed nothing.
        held: where signals go on being noted after the steps, until it is closed; None = no longer.
        phases: measures time and memory; each step is the phase "train", and what it finds enters
            the step's row.
    """

    config: TrainingConfig
    run: RunFolder
    parallel: Parallel
    _: KW_ONLY
    stop: StopRequest = field(default_factory=StopRequest)
    held: contextlib.ExitStack | None = None
    phases: Phases | None = None
