"""A model of four weights, its batches and its terms, for steps that can be worked out by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rrhf.data.collate import EncodedSet, TokenBatch
from rrhf.training.core.update import Term

WEIGHTS = (0.3, -0.2, 0.5, 0.1)


RATE = 0.1


SETS = [
    EncodedSet([9], [[1, 2], [3]]),
    EncodedSet([8, 8], [[0, 0, 1]]),
    EncodedSet([7, 7, 7], [[2]]),
]


class Table(nn.Module):
    """Each token is worth a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(WEIGHTS))

    def forward(self, batch: TokenBatch) -> Tensor:
        return self.weight[batch.response_ids] * batch.response_mask


class Terms:
    """Mean square of a token; half the mean sum of a prompt's tokens; and a term of nothing."""

    def denominators(self, batch: TokenBatch) -> dict[str, Tensor]:
        rows = batch.row_weights
        return {
            "square": (batch.response_lengths * rows).sum(),
            "sum": batch.prompt_weights.sum() / 8,  # below one in all
            "none": torch.zeros(()),
        }

    def __call__(self, outputs: Tensor, batch: TokenBatch) -> dict[str, Term]:
        rows = batch.row_weights
        lengths = (batch.response_lengths * rows).sum()
        metrics = {"length": (lengths, rows.sum()), "share": (rows.sum() / 16, rows.sum() / 8)}
        return {
            "square": Term((outputs.square().sum(1) * rows).sum(), 1.0, metrics),
            "sum": Term((outputs.sum(1) * rows).sum(), 0.5),
            "none": Term(outputs.sum(), 7.0, {"never": (torch.zeros(()), torch.zeros(()))}),
        }
