"""From scores to advantages in one piece, against plain float64 arithmetic over ragged rows.

`test_advantages`, `test_kl`, `test_rewards` and `test_normalizers` hold each quantity to its own
oracle; here it is their order, and what is handed from one to the next.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import settings

from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.data.collate import EncodedSet
from rrhf.training.online.experience import RolloutRow, build_experience, pack, unpack

LENGTHS = (1, 4, 2, 7, 3, 5)
BETA, GAMMA, LAMBDA, LIMIT, PENALTY = 0.3, 0.9, 0.8, 1.2, 0.4
SETTINGS: dict[str, Any] = {
    "gamma": GAMMA,
    "gae_lambda": LAMBDA,
    "clip_range_score": LIMIT,
    "missing_eos_penalty": PENALTY,
    "normalize_reward": True,
}
TOLERANCE = 2e-5  # tables of float32, sums of at most seven terms of size up to 5


@dataclass
class Numbers:
    """One response, as plain numbers."""

    old: list[float]
    reference: list[float]
    values: list[float]
    score: float
    is_finished: bool


def responses() -> list[Numbers]:
    chance = random.Random(19)
    found = [
        Numbers(
            [-3 * chance.random() for _ in range(length)],
            [-3 * chance.random() for _ in range(length)],
            [chance.gauss(0, 1) for _ in range(length)],
            chance.gauss(2, 1),
            place % 2 == 0,
        )
        for place, length in enumerate(LENGTHS)
    ]
    found[3].score = 9.0  # far beyond the limit
    return found


def rows() -> list[RolloutRow]:
    return [
        RolloutRow(
            prompt=place // 2,
            sample=place % 2,
            prompt_ids=[5, 6],
            token_ids=list(range(10, 10 + len(one.old))),
            old_logprobs=torch.tensor(one.old),
            reference_logprobs=torch.tensor(one.reference),
            values=torch.tensor(one.values),
            score=one.score,
            is_finished=one.is_finished,
        )
        for place, one in enumerate(responses())
    ]


def by_hand(
    whitened: bool = True,
    unbiased: bool = True,
    shift: int = 0,
    clips_first: bool = True,
    temperature: float = 1.0,
    unbiased_scores: bool = False,
) -> tuple[list[float], list[float]]:
    """Advantages and returns of all tokens in order; the arguments make the wrong variants."""
    scores = [one.score for one in responses()]
    mean = statistics.fmean(scores)
    spread = statistics.stdev(scores) if unbiased_scores else statistics.pstdev(scores)
    advantages, returns = [], []
    for one in responses():
        n = len(one.old)
        reward = (one.score - mean) / (spread + 1e-8)
        pay = 0.0 if one.is_finished else PENALTY
        held = min(max(reward, -LIMIT), LIMIT) - pay
        if not clips_first:
            held = min(max(reward - pay, -LIMIT), LIMIT)
        r = [-BETA * (a / temperature - b) for a, b in zip(one.old, one.reference, strict=True)]
        r[max(n - 1 - shift, 0)] += held
        v = [*one.values, 0.0]
        delta = [r[t] + GAMMA * v[t + 1] - v[t] for t in range(n)]
        a = [
            math.fsum((GAMMA * LAMBDA) ** (s - t) * delta[s] for s in range(t, n)) for t in range(n)
        ]
        advantages += a
        returns += [x + y for x, y in zip(a, one.values, strict=True)]
    if whitened:
        centre = statistics.fmean(advantages)
        variance = statistics.variance(advantages) if unbiased else statistics.pvariance(advantages)
        advantages = [(x - centre) / math.sqrt(variance + 1e-8) for x in advantages]
    return advantages, returns


def built(**changes: Any) -> tuple[list[float], list[float]]:
    config = settings(Path("unused"), "unused", **SETTINGS | changes)
    sets = build_experience(rows(), config, BETA, RunningMeanStd()).sets
    advantages, returns = (
        [x for s in sets for x in stored_of(s)[name]] for name in ("advantages", "returns")
    )
    return advantages, returns


def stored_of(one: EncodedSet) -> dict[str, list[float]]:
    """What is known of the tokens of its only response."""
    assert one.experience is not None
    (stored,) = one.experience
    return {name: values.tolist() for name, values in stored.tensors().items()}


def distance(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def test_advantages_and_returns_equal_the_arithmetic() -> None:
    for mine, expected in zip(built(), by_hand(), strict=True):
        assert distance(mine, expected) < TOLERANCE
    raw, _ = built(normalize_advantage=False)
    assert distance(raw, by_hand(whitened=False)[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("wrong", "is_in_returns"),
    [
        ({"shift": 1}, True),  # the score one token early
        ({"unbiased": False}, False),  # the other variance in whitening
        ({"unbiased_scores": True}, True),  # the other variance in the normaliser
        ({"clips_first": False}, True),  # the penalty swallowed by the clip
        ({"temperature": 0.7}, True),  # log-probs of another temperature
        ({"whitened": False}, False),
    ],
    ids=lambda value: str(value),
)
def test_wrong_variants_are_told_apart(wrong: dict[str, Any], is_in_returns: bool) -> None:
    (mine, returns), (other, other_returns) = built(), by_hand(**wrong)
    assert distance(mine, other) > 100 * TOLERANCE
    assert (distance(returns, other_returns) > 100 * TOLERANCE) is is_in_returns


def test_what_is_said_of_a_rollout_is_so() -> None:
    config = settings(Path("unused"), "unused", **SETTINGS)
    experience = build_experience(rows(), config, BETA, RunningMeanStd())
    metrics, all_of_them = experience.metrics, responses()
    kl = [math.fsum(a - b for a, b in zip(x.old, x.reference, strict=True)) for x in all_of_them]
    k3 = [
        math.fsum(math.exp(b - a) - 1 + a - b for a, b in zip(x.old, x.reference, strict=True))
        for x in all_of_them
    ]
    assert metrics["score"] == pytest.approx(statistics.fmean(x.score for x in all_of_them))
    assert metrics["kl"] == pytest.approx(statistics.fmean(kl), abs=1e-5) == experience.kl
    assert metrics["kl_k3"] == pytest.approx(statistics.fmean(k3), rel=1e-5)
    assert metrics["kl_k3"] != pytest.approx(statistics.fmean(kl), rel=1e-2)  # the control
    assert metrics["finished_fraction"] == 0.5 and metrics["response_length"] == 22 / 6
    assert experience.row_kl == pytest.approx(kl, abs=1e-5)
    assert metrics["response_length_min"] == 1 and metrics["response_length_max"] == 7
    assert metrics["kl_coefficient"] == BETA and experience.num_responses == len(all_of_them)
    scores = [x.score for x in all_of_them]
    mean, spread = statistics.fmean(scores), statistics.pstdev(scores)
    assert metrics["score_deviation"] == pytest.approx(spread)
    normal = [(score - mean) / spread for score in scores]
    is_clipped = [abs(score) > LIMIT for score in normal]
    assert metrics["clipped_score_fraction"] == sum(is_clipped) / 6 == 1 / 6
    assert sum(abs(score) > LIMIT for score in scores) > 1  # the control: raw ones
    rewards = [
        min(max(score, -LIMIT), LIMIT) - (0.0 if x.is_finished else PENALTY) - BETA * nats
        for score, x, nats in zip(normal, all_of_them, kl, strict=True)
    ]
    assert experience.rewards == pytest.approx(rewards, abs=1e-5)
    assert metrics["reward"] == pytest.approx(statistics.fmean(rewards), abs=1e-5)
    _, returns = by_hand()
    values = [v for x in all_of_them for v in x.values]
    errors = [r - v for r, v in zip(returns, values, strict=True)]
    explained = 1 - statistics.pvariance(errors) / statistics.pvariance(returns)
    assert metrics["explained_variance"] == pytest.approx(explained, abs=1e-4)


def test_what_the_rollout_said_is_kept_token_by_token() -> None:
    config = settings(Path("unused"), "unused", **SETTINGS, kl_in="loss")
    sets = build_experience(rows(), config, BETA, RunningMeanStd()).sets
    for one, known in zip(sets, responses(), strict=True):
        kept = stored_of(one)
        assert kept["old_logprobs"] == pytest.approx(known.old)
        assert kept["old_values"] == pytest.approx(known.values)
        assert kept["reference_logprobs"] == pytest.approx(known.reference)
        wanted = [a + v for a, v in zip(kept["returns"], [0.0] * len(known.old), strict=True)]
        assert wanted != pytest.approx(known.values)
    plain = build_experience(rows(), settings(Path("unused"), "unused"), BETA)
    assert "reference_logprobs" not in stored_of(plain.sets[0])


@pytest.mark.parametrize("method", ["rloo", "grpo", "dr_grpo", "gopo"])
def test_a_prompt_that_lost_all_its_responses_leaves_no_hole(method: str) -> None:
    """Prompts 0, 1 and 2 of a rollout, or 0, 4 and 9: the same advantages."""
    config = settings(Path("unused"), "unused", method=method, num_return_sequences=2)
    found = []
    for names in ((0, 1, 2), (0, 4, 9)):
        named = [replace(row, prompt=names[row.prompt], values=None) for row in rows()]
        sets = build_experience(named, config, BETA).sets
        found.append([x for s in sets for x in stored_of(s)["advantages"]])
    assert found[0] == found[1]
    assert len(set(found[0])) > (1 if method == "gopo" else 3)  # ranks of two are -2 and 2


@pytest.mark.parametrize("is_whitened", [True, False])
def test_reinforce_pp_is_the_discounted_reward_to_come(is_whitened: bool) -> None:
    config = settings(
        Path("unused"),
        "unused",
        method="reinforce_pp",
        gamma=GAMMA,
        clip_range_score=0.0,
        normalize_advantage=is_whitened,
    )
    sets = build_experience([replace(row, values=None) for row in rows()], config, BETA).sets
    found = [x for s in sets for x in stored_of(s)["advantages"]]
    wanted = []
    for one in responses():
        r = [-BETA * (a - b) for a, b in zip(one.old, one.reference, strict=True)]
        r[-1] += one.score
        n = len(r)
        wanted += [math.fsum(GAMMA ** (s - t) * r[s] for s in range(t, n)) for t in range(n)]
    if is_whitened:
        centre, spread = statistics.fmean(wanted), statistics.stdev(wanted)
        wanted = [(x - centre) / spread for x in wanted]
    assert distance(found, wanted) < TOLERANCE * 10


def test_nothing_is_rounded_on_the_way_to_a_checkpoint() -> None:
    sets = [EncodedSet([5], [[6], [7, 8]], [0.1, 1 / 3]), EncodedSet([9, 9], [[4]], [-1e-9])]
    assert [s.scores for s in unpack(pack(sets))] == [s.scores for s in sets]
