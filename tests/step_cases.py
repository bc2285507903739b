"""A signal after a chosen step of a run, whatever it trains."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping

import pytest

from rrhf.training.core.hooks import Hooks


@contextlib.contextmanager
def stopped_after(step: int) -> Iterator[None]:
    """SIGTERM for the first rank after that step; the others hear of it from the loop."""
    plain = Hooks.after_step

    def after_step(self: Hooks, number: int, metrics: Mapping[str, float]) -> dict[str, float]:
        found = plain(self, number, metrics)
        if number == step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hooks, "after_step", after_step)
        yield
