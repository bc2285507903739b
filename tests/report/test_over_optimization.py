"""A sentence on over-optimisation must say what the curve shows, and not more."""

from __future__ import annotations

from typing import Any

from method_rows import around, row

from rrhf.report.over_optimization import find_divergence, sentence


def curve(*points: tuple[float, float]) -> list[dict[str, Any]]:
    """(gold, reward) of each point; a point's KL is its place."""
    return [
        row(f"point {i}", around(gold), around(reward), kl=float(i))
        for i, (gold, reward) in enumerate(points)
    ]


def test_gold_that_falls_while_reward_rises_is_told_with_its_peak() -> None:
    found = find_divergence(curve((0.0, 0.0), (0.5, 0.5), (0.8, 1.0), (0.4, 1.5), (0.2, 2.0)))
    assert (found.kind, found.kl) == ("falls", 2.0)
    assert abs(found.gold - 0.8) < 1e-9 and abs(found.reward - 1.0) < 1e-9
    assert abs(found.gold_gain["mean"] + 0.6) < 1e-9
    told = sentence("PPO", found)
    assert told.startswith("PPO: gold peaks at 0.80, at reward 1.00 (KL 2.0 nats), and falls by")


def test_gold_that_stands_still_is_told_from_where_it_does() -> None:
    found = find_divergence(curve((0.0, 0.0), (0.6, 0.5), (0.6, 1.0), (0.6, 1.5)))
    assert (found.kind, found.reward, found.kl) == ("stalls", 0.5, 1.0)
    assert abs(found.reward_gain["mean"] - 1.0) < 1e-9
    assert "stops following at reward 0.50" in sentence("RLOO", found)


def test_gold_that_rises_at_half_its_pace_is_told_to_slow() -> None:
    """.8 for each unit of reward up to the second point, .4 from there on."""
    found = find_divergence(curve((0.0, 0.0), (0.4, 0.5), (0.6, 1.0), (0.8, 1.5)))
    assert (found.kind, found.kl) == ("slows", 1.0)
    assert found.gold_at_pace is not None and abs(found.gold_at_pace - 0.8) < 1e-9
    told = sentence("RRHF", found)
    assert "from reward 0.50 (KL 1.0 nats) on gold follows more slowly: it rises by 0.40" in told


def test_gold_that_is_not_seen_to_rise_but_goes_at_half_its_pace_is_no_stall() -> None:
    """1 for each unit of reward, then .6 over 1.5 units, known to within .7: seen to go slower than
    its pace, but neither to rise nor to go slower than at half of it.
    """
    noise = [2.3 if i % 2 else -2.3 for i in range(40)]
    before, middle = row("a", [0.0] * 40, [0.0] * 40), row("b", [3.0] * 40, [3.0] * 40)
    last = row("c", [3.6 + x for x in noise], [4.5] * 40)
    found = find_divergence([before, middle, last])
    assert found.gold_gain["low"] < 0 < found.gold_gain["mean"] and found.kind == "slows"


def test_the_pace_is_gold_for_each_unit_of_reward() -> None:
    """.5 a unit up to reward 2; over two units more it would be 1, whatever gold did there."""
    slowed = find_divergence(curve((0.0, 0.0), (1.0, 2.0), (1.4, 4.0)))
    assert slowed.kind == "slows" and abs((slowed.gold_at_pace or 0) - 1.0) < 1e-9
    stood = find_divergence(curve((0.0, 0.0), (1.0, 2.0), (1.0, 4.0)))
    assert stood.kind == "stalls" and abs((stood.gold_at_pace or 0) - 1.0) < 1e-9
    fell = find_divergence(curve((0.0, 0.0), (1.0, 2.0), (0.4, 4.0)))
    assert fell.kind == "falls" and abs((fell.gold_at_pace or 0) - 1.0) < 1e-9
    assert "by 1.00" in sentence("PPO", stood)


def test_gold_that_never_rises_is_not_said_to_follow() -> None:
    found = find_divergence(curve((0.1, 0.0), (0.1, 0.5), (0.1, 1.0)))
    assert (found.kind, found.reward, found.gold_at_pace) == ("stalls", 0.0, None)
    assert "not seen to follow at all" in sentence("PPO", found)


def test_a_last_step_too_small_to_see_is_no_stall() -> None:
    """Gold's gain of .02 is not told from zero, nor from its pace."""
    noise = [0.3 if i % 2 else -0.3 for i in range(40)]
    before, middle = row("a", [0.0] * 40, [0.0] * 40), row("b", [0.5] * 40, [0.5] * 40)
    last = row("c", [0.52 + x for x in noise], [0.53] * 40)
    assert find_divergence([before, middle, last]).kind == "follows"


def test_nothing_is_claimed_where_gold_follows_to_the_end() -> None:
    found = find_divergence(curve((0.0, 0.0), (0.4, 0.5), (0.8, 1.0)))
    assert found.kind == "follows"
    assert abs(found.gold_gain["mean"] - 0.8) < 1e-9
    assert "not seen in this range" in sentence("GRPO", found)


def test_a_fall_within_the_noise_is_no_fall() -> None:
    """The last step of gold is -.02, prompts differ by 1: paired noise hides it, reward's too."""
    noise = [1.0 if i % 3 else -1.0 for i in range(40)]
    before = row("a", [0.0] * 40, [0.0] * 40)
    peak = row("b", [0.5 + x for x in noise], [1.0] * 40)
    last = row("c", [0.48 - x for x in noise], [1.0 + x for x in noise])
    assert find_divergence([before, peak, last]).kind != "falls"


def test_a_reward_that_does_not_rise_says_nothing() -> None:
    found = find_divergence(curve((0.0, 0.5), (0.1, 0.5)))
    assert found.kind == "flat"
    assert "not seen to rise" in sentence("RRHF", found)


def test_the_bound_stands_in_for_the_kl_of_best_of_n() -> None:
    points = curve((0.0, 0.0), (0.5, 0.5))
    last = points[-1]
    del last["metrics"]["kl"]
    last["metrics"]["kl_bound"] = {"mean": 0.64, "low": None, "high": None, "n": 40}
    assert find_divergence(points).kl == 0.64
