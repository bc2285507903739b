"""The benchmark of mixed queries: every cut comes to the same sum, and its counts are right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import mixed_queries
from benchmarks.mixed_queries import Lengths, Queries
from rrhf.models.forward.logprobs import LogprobOptions, Policy

TINY = Queries.drawn((32, 2, 64), 0, Lengths(9, 0.6, 3, 40), Lengths(5, 0.6, 2, 30))


def test_every_variant_comes_to_the_baselines_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(mixed_queries.CASES, "tiny", TINY)
    result = mixed_queries.run("tiny", 1, list(mixed_queries.VARIANTS))
    assert result["batches"]["original"] == 3 and result["batches"]["shared_prefix_alone"] == 12
    assert result["tokens"]["shared_prefix_all"] == sum(TINY.prompts) + sum(
        map(sum, TINY.responses)
    )
    assert "original_by_length" in mixed_queries.table(result)
    warm = replace(
        mixed_queries.VARIANTS["padded_2048"],
        build=lambda model: Policy(model, LogprobOptions(1.001)),
    )
    monkeypatch.setitem(mixed_queries.VARIANTS, "wrong", warm)
    with pytest.raises(AssertionError, match="wrong differs"):
        mixed_queries.run("tiny", 1, ["wrong"])


def test_the_ratios_by_hand() -> None:
    """One layer, H 8, V 10: 672 weights and a head of 80 (as in the benchmarks' own tests); two
    queries in one batch, four rows as wide as the longest, which has 2 + 4 tokens.
    """
    queries = Queries(8, 1, 10, (3, 2), ((2, 1), (4, 1)))
    needed = sum(shape.work().body + shape.work().head for shape in queries.shapes)
    assert queries.theory() == pytest.approx(4 * 6 * (672 + 80 + 6 * 16) / needed)


def test_lengths_stay_within_their_bounds() -> None:
    drawn = Lengths(40, 2.0, 20, 60).drawn(300, torch.Generator().manual_seed(0))
    assert min(drawn) == 20 and max(drawn) == 60
