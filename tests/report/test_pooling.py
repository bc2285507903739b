"""Rows of several seeds become one, of which every later difference is taken."""

from __future__ import annotations

import pytest
from method_rows import around, row

from rrhf.evaluation.bootstrap import paired_difference
from rrhf.evaluation.results import measure_from_json
from rrhf.report.over_optimization import find_divergence
from rrhf.report.pooling import pooled_rows


def test_every_prompt_of_every_seed_counts_in_means_and_in_paired_differences() -> None:
    before = pooled_rows([[row("a", around(0.0), around(0.0))] for _ in range(3)])[0]
    after = pooled_rows([[row("b", around(gold), around(1.0))] for gold in (0.0, 0.3, 0.9)])[0]
    assert after["metrics"]["gold"]["n"] == 120
    gain = paired_difference(
        *(measure_from_json(one["per_prompt"]["gold"]) for one in (after, before))
    )
    assert gain.n == 120 and gain.mean == pytest.approx(0.4)
    assert gain.mean == pytest.approx(
        after["metrics"]["gold"]["mean"] - before["metrics"]["gold"]["mean"]
    )


def test_gold_that_stalls_on_the_first_seed_alone_has_not_stalled() -> None:
    start = [[row("a", around(0.0), around(0.0))] for _ in range(3)]
    end = [[row("b", around(gold), around(1.0))] for gold in (0.0, 0.5, 0.5)]
    assert find_divergence([*pooled_rows(start[:1]), *pooled_rows(end[:1])]).kind == "stalls"
    assert find_divergence([*pooled_rows(start), *pooled_rows(end)]).kind == "follows"
