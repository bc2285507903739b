"""The benchmark of scoring compares before it times, and its ratio of operations is right."""

from __future__ import annotations

import pytest

from benchmarks import scoring
from benchmarks.shapes import Shape

TINY = Shape(32, 2, 64, 9, (5, 3, 6))


@pytest.mark.parametrize("trains", [False, True])
def test_scores_are_compared_before_anything_is_timed(
    trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(scoring.CASES, "tiny", scoring.Case(TINY, trains))
    result = scoring.run("tiny", 1)
    assert list(result["timings"])[:2] == ["padded", "shared_prefix"]
    assert "P9 R3..6 N3" in scoring.table(result)
    inner = scoring.build_reward_model

    def other_weights(model, layout):
        if layout == "shared_prefix":
            model.score.weight.data *= 1.001
        return inner(model, layout)

    monkeypatch.setattr(scoring, "build_reward_model", other_weights)
    monkeypatch.setattr(scoring, "timed", None)
    with pytest.raises(AssertionError, match="shared_prefix differs"):
        scoring.run("tiny", 1)


def test_the_ratio_of_operations_by_hand() -> None:
    """One layer, H 8: 672 weights (see the RRHF step); P 3; even rows need no mask."""
    ragged = scoring.Case(Shape(8, 1, 10, 3, (2, 1))).theory()
    once = (3 + 3) * 672 + (4.5 + 2 * 3 + 2 + 1 * 3 + 0.5) * 16
    assert ragged == pytest.approx((2 * 5 * 672 + 2 * 25 * 16) / once)
    even = scoring.Case(Shape(8, 1, 10, 3, (2, 2))).theory()
    once = (3 + 4) * 672 + (4.5 + 2 * (2 * 3 + 2)) * 16
    assert even == pytest.approx((2 * 5 * 672 + 2 * 12.5 * 16) / once)
