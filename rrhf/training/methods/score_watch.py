"""What a normaliser learns while a reward model is trained: the scores of each step, once.

Every rank ends up with the same normaliser, and a resumed run with the one that it had.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rrhf.algorithms.normalizers import Moments, Normalizer, normalizer_from_state
from rrhf.data.collate import TokenBatch
from rrhf.errors import UserError
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.streams import OfflineStream


class ScoreWatch:
    """Shows a normaliser the end scores of each optimiser step, once, over all ranks.

    Args:
        normalizer: what learns, or None.
    """

    def __init__(self, normalizer: Normalizer | None) -> None:
        self.normalizer = normalizer
        self._pending = Moments()

    def see(self, scores: Tensor) -> None:
        """Remember the scores of one micro-batch."""
        if self.normalizer is not None:
            self._pending = self._pending.merge(Moments.of(scores))

    def end_step(self, parallel: Parallel) -> None:
        """Hand what was seen since the last step, on every rank, to the normaliser."""
        if self.normalizer is None:
            return
        mine, self._pending = self._pending, Moments()
        total, count = parallel.sum(
            torch.tensor([mine.mean * mine.count, float(mine.count)], dtype=torch.float64)
        ).tolist()
        mean = mine.mean if parallel.world_size == 1 else total / max(count, 1.0)
        spread = mine.squared_deviations + mine.count * (mine.mean - mean) ** 2
        squared = parallel.sum(torch.tensor([spread], dtype=torch.float64))
        self.normalizer.update(Moments(int(count), mean, float(squared)))


class WatchedStream:
    """A stream that ends each step for a `ScoreWatch`, and keeps its normaliser for resuming."""

    def __init__(self, stream: OfflineStream, watch: ScoreWatch, parallel: Parallel) -> None:
        self._stream, self._watch, self._parallel = stream, watch, parallel
        self.total_steps = stream.total_steps

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        return iter(self._stream)

    def observe(self, metrics: dict[str, float]) -> None:
        self._watch.end_step(self._parallel)
        self._stream.observe(metrics)

    def state_dict(self) -> dict[str, Any]:
        normalizer = self._watch.normalizer
        state = None if normalizer is None else normalizer.state_dict()
        return {**self._stream.state_dict(), "normalizer": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stream.load_state_dict(state)
        saved, mine = state["normalizer"], self._watch.normalizer
        if (saved or {}).get("type") != (mine.state_dict()["type"] if mine else None):
            raise UserError(
                "resume: --normalizer_type is not what the checkpoint had; start with the same"
            )
        if saved is not None:
            self._watch.normalizer = normalizer_from_state(saved)
