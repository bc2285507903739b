"""Plain rivals of a reward model: each sees the two replies of a pair, not what was asked."""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rrhf.data.views import split_by_first_turn
from rrhf.records import CandidateSet

NUM_BUCKETS = 4096
L2_GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_WORD = re.compile(r"\w+|[^\w\s]")


def verdict(lead: float) -> float:
    """1 where the chosen reply leads, 0.5 for a tie."""
    return 0.5 if lead == 0 else float(lead > 0)


def shorter_is_chosen(pair: CandidateSet) -> float:
    """1 where the chosen reply has fewer characters, 0.5 where both have as many."""
    chosen, rejected = (len(candidate.response) for candidate in pair.candidates)
    return verdict(rejected - chosen)


def features(text: str) -> Tensor:
    """[NUM_BUCKETS] square roots of the counts of hashed words and neighbouring pairs of words."""
    words = _WORD.findall(text.lower())
    grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
    counts = Counter(zlib.crc32(gram.encode("utf-8", "replace")) % NUM_BUCKETS for gram in grams)
    found = torch.zeros(NUM_BUCKETS)
    for bucket, count in counts.items():
        found[bucket] = count**0.5
    return found


def differences(sets: Sequence[CandidateSet]) -> Tensor:
    """[pairs, NUM_BUCKETS] features of the chosen reply minus those of the rejected one."""
    rows = [features(s.candidates[0].response) - features(s.candidates[1].response) for s in sets]
    return torch.stack(rows)


def fit_bradley_terry(rows: Tensor, l2: float) -> Tensor:
    """Weights w that minimise the mean of -log sigmoid(w x) plus l2 * |w|^2 / 2 (L-BFGS).

    Args:
        rows: [pairs, features] chosen minus rejected.
        l2: strength of the penalty.

    Returns:
        [features].
    """
    weights = torch.zeros(rows.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, history_size=20, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -logsigmoid(rows @ weights).mean() + 0.5 * l2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weights.detach()


def choose_l2(sets: Sequence[CandidateSet], seed: int) -> float:
    """The penalty that does best on a fifth of the training pairs, split off by first turn; the
    test fold is not looked at."""
    parts = split_by_first_turn(sets, {"inner": 0.8, "choice": 0.2}, seed + 1)
    inner, choice = differences(list(parts["inner"])), differences(list(parts["choice"]))
    right = {
        l2: float((choice @ fit_bradley_terry(inner, l2) > 0).float().mean()) for l2 in L2_GRID
    }
    return max(right, key=lambda l2: (right[l2], l2))
