"""Canaries of a server that rounds to bfloat16, by numbers instead of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rrhf.errors import UserError
from rrhf.generation.vllm.canaries import Canaries, WrongWeights
from rrhf.generation.vllm.server import Choice

LENGTHS = (24, 40, 72, 100, 136, 160, 200, 264)
PROMPTS = [[place] * length for place, length in enumerate(LENGTHS)]


class Numbers:
    """A policy that moves by random steps, and a server whose rounding changes with each sync.

    Attributes:
        policy, served: log-probs of each prompt's tokens but the first, and of one more token.
    """

    def __init__(self, rounding: float) -> None:
        self._random, self._rounding = torch.Generator().manual_seed(0), rounding
        self._bias = self._noise(rounding)  # most of the rounding stays from sync to sync
        self.policy = self._noise(1.0)
        self.load()

    def _noise(self, size: float) -> list[torch.Tensor]:
        return [size * torch.randn(length, generator=self._random) for length in LENGTHS]

    def move(self, size: float) -> None:
        moves = self._noise(size)
        self.policy = [one + step for one, step in zip(self.policy, moves, strict=True)]

    def load(self) -> None:
        parts = zip(self.policy, self._bias, self._noise(self._rounding / 2), strict=True)
        self.served = [one + bias + noise for one, bias, noise in parts]

    def score(self, texts: Any) -> list[torch.Tensor]:
        return [one[: len(ids) - 1] for one, ids in zip(self.policy, texts, strict=True)]

    def prompt_logprobs(self, served: Any, prompts: Any) -> list[list[float]]:
        return [one[:-1].tolist() for one in self.served]

    def complete(self, served: Any, prompts: Any, asked: Any) -> list[list[Choice]]:
        return [[Choice([1], [float(self.served[ids[0]][-1])], "length")] for ids in prompts]


def checked(numbers: Numbers) -> Callable[[], Any]:
    """Return the check of a server that was just given weights; its bound is out of the way."""
    server: Any = numbers
    canaries = Canaries(server, PROMPTS, numbers.score, bound=1.0)
    return lambda: canaries.check(server)


@pytest.mark.parametrize("move", [0.01, 0.03, 0.1, 0.15])
def test_a_skipped_sync_shows_in_bfloat16(move: float) -> None:
    """Differences of 0.06 nats a token from rounding alone, as a real server has."""
    numbers = Numbers(rounding=0.07)
    check = checked(numbers)
    for _ in range(4):
        check()
        numbers.move(move)
        numbers.load()
    check()
    numbers.move(move)
    with pytest.raises(WrongWeights, match=r"still has the weights .* moved 0 times as far"):
        check()


def test_a_policy_that_hardly_moves_is_not_refused_for_the_servers_rounding() -> None:
    numbers = Numbers(rounding=0.07)
    check = checked(numbers)
    for move in (0.0, 1e-6, 1e-4, 1e-3, 3e-3, 3e-3, 3e-3, 3e-3):
        check()
        numbers.move(move)
        numbers.load()
    check()


@pytest.mark.parametrize("place", [0, 7])
def test_a_policy_that_is_not_finite_is_said(place: int) -> None:
    numbers = Numbers(rounding=0.0)
    numbers.policy[place][3] = torch.nan
    with pytest.raises(UserError, match=r"the policy's log-probs .* not finite"):
        checked(numbers)()
