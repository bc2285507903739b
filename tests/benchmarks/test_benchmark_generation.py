"""The benchmark of generation measures what it says."""

from __future__ import annotations

import pytest

from benchmarks import generation
from benchmarks.generation import Peers, Rollout
from benchmarks.shapes import Shape

TINY = Shape(32, 2, 64, 9, (5, 3, 6))
CASE = Rollout(TINY, (9, 6, 4), ((5, 3, 6), (2, 9, 3), (4, 4, 4)), 4)


@pytest.mark.parametrize("variant", [v for v in generation.VARIANTS if v != "generate_batch"])
def test_every_variant_writes_responses_of_the_lengths_asked_for(variant):
    Peers(CASE).check(variant)
    assert [[len(ids) for ids in one] for one in Peers(CASE).generate()] == [
        list(one) for one in CASE.lengths
    ]


def test_wrong_log_probs_and_wrong_greedy_tokens_are_found(monkeypatch):
    peers = Peers(CASE)
    peers.require_greedy_equal()
    true = generation.ByParams.__call__
    monkeypatch.setattr(generation.ByParams, "__call__", lambda s, x, *a: true(s, x * 1.001, *a))
    with pytest.raises(AssertionError, match="log-probs off"):
        peers.check("shared_prompt")
    monkeypatch.setattr(generation.ByParams, "__call__", lambda s, x, *a: true(s, -x, *a))
    monkeypatch.setattr(
        "rrhf.generation.local.row_loop.ByParams.__call__", lambda *a: true(a[0], -a[1], *a[2:])
    )
    with pytest.raises(AssertionError, match="greedy"):
        peers.require_greedy_equal()


def test_the_flop_ratio_by_hand():
    """Body 672, head 80, pairs 2*8*1: `generate` pads both rows to 2 tokens (test_benchmarks)."""
    case = Rollout(Shape(8, 1, 10, 3, (2, 1)), (3,), ((2, 1),), 2)
    plain = 2 * (3 * 672 + 4.5 * 16 + 2 * 752 + (6 + 2) * 16)
    shared = 3 * 672 + 4.5 * 16 + 2 * 752 + 8 * 16 + 752 + 3.5 * 16
    assert case.theory() == pytest.approx(plain / shared)
