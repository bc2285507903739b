"""The pictures of methods: every curve drawn, every name readable."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from rrhf.report.method_figures import GOLD_AGAINST_REWARD, REWARD_AGAINST_KL, apart, draw


def row(kl: float, reward: float, gold: float, doubt: float | None = None) -> dict[str, Any]:
    def metric(mean: float) -> dict[str, Any]:
        low, high = (None, None) if doubt is None else (mean - doubt, mean + doubt)
        return {"mean": mean, "low": low, "high": high}

    return {"metrics": {"kl": metric(kl), "reward": metric(reward), "gold": metric(gold)}}


def test_labels_move_apart_and_no_further_than_they_must() -> None:
    assert apart([0.0, 0.5, 1.0], 0.1, 0.0, 1.0) == [0.0, 0.5, 1.0]
    placed = apart([0.5, 0.5, 0.52, 0.9], 0.1, 0.0, 1.0)
    assert placed[3] == 0.9
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(placed))
    assert abs(sum(placed[:3]) - 1.52) < 1e-9


def test_labels_stay_within_the_picture() -> None:
    placed = apart([0.98, 0.99, 1.0], 0.1, 0.0, 1.0)
    assert max(placed) <= 1.0 + 1e-9
    assert min(apart([0.0, 0.0], 0.1, 0.0, 1.0)) >= -1e-9


def test_groups_that_come_to_touch_are_laid_out_together() -> None:
    placed = apart([0.0, 0.01, 0.12, 0.13], 0.1, -1.0, 1.0)
    gaps = [b - a for a, b in itertools.pairwise(placed)]
    assert all(abs(gap - 0.1) < 1e-9 for gap in gaps)


def test_every_method_is_named_on_a_light_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    curves = {
        name: [row(0.0, 0.0, 0.0), row(1.0 + i, 0.5 + i / 9, 0.3, 0.1)]
        for i, name in enumerate(["PPO", "RLOO", "GRPO", "online RRHF"])
    }
    for axes in (REWARD_AGAINST_KL, GOLD_AGAINST_REWARD):
        path = draw(curves, axes, tmp_path / f"{axes.y}.png")
        picture = imread(path)[..., :3]
        assert picture.shape[0] > 400 and picture.shape[1] > 700
        assert picture[0, 0].min() == 1.0
        fewer = draw({"PPO": curves["PPO"]}, axes, tmp_path / "one.png")
        assert len({tuple(c) for c in picture.reshape(-1, 3)}) > len(
            {tuple(c) for c in imread(fewer)[..., :3].reshape(-1, 3)}
        )
