"""Signs that a run cannot learn: seen in time, said once, with the figure and the flag."""

import logging
from types import SimpleNamespace

import pytest

from rrhf.training.online.no_learning import ROLLOUTS, NoLearning, nothing_compares

GOOD = {"finished_fraction": 0.5, "score": 1.0, "score_deviation": 1.0, "explained_variance": 0.4}


def rows(*scores_by_prompt):
    return [
        SimpleNamespace(prompt=prompt, score=score)
        for prompt, scores in enumerate(scores_by_prompt)
        for score in scores
    ]


DIFFERENT = rows([0.0, 1.0], [2.0, 3.0])
SAME_IN_GROUPS = rows([1.0, 1.0], [3.0, 3.0])
SAME = rows([2.0, 2.0], [2.0, 2.0])


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, "rrhf")
    return lambda: [record.getMessage() for record in caplog.records]


def watch(method="ppo"):
    return NoLearning(SimpleNamespace(method=method, max_new_tokens=16))


@pytest.mark.parametrize(
    ("change", "of_rollout", "words"),
    [
        ({"finished_fraction": 0.0}, DIFFERENT, ["no response ends", "--max_new_tokens 16"]),
        ({"score": 2.0, "score_deviation": 0.0}, SAME, ["all scores are equal", "score (2)"]),
        ({"explained_variance": -0.25}, DIFFERENT, ["last -0.25", "--critic_warmup_steps"]),
    ],
)
def test_a_sign_is_said_once_after_some_rollouts_in_a_row(change, of_rollout, words, said):
    signs = watch()
    needed = ROLLOUTS[{"f": "endless", "s": "tied", "e": "blind"}[next(iter(change))[0]]]
    for _ in range(needed - 1):
        signs.see(GOOD | change, of_rollout)
    signs.see(GOOD, DIFFERENT)  # which begins the count anew
    for _ in range(needed - 1):
        signs.see(GOOD | change, of_rollout)
    assert said() == []
    for _ in range(20):
        signs.see(GOOD | change, of_rollout)
    signs.finish()
    (line,) = said()
    assert all(word in line for word in words)


def test_a_short_run_says_at_its_end_what_all_of_it_has_shown(said):
    signs = watch()
    signs.see(GOOD | {"finished_fraction": 0.0}, DIFFERENT)
    signs.see(GOOD | {"finished_fraction": 0.0, "explained_variance": -1.0}, DIFFERENT)
    assert said() == []
    signs.finish()
    (line,) = said()
    assert "no response ends: in 2 rollouts in a row" in line


def test_a_critic_that_learns_alone_is_given_time(said):
    signs = watch()
    for _ in range(20):
        signs.see(GOOD | {"explained_variance": -1.0}, DIFFERENT, is_warm_up=True)
    signs.finish()
    assert said() == []


def test_a_good_run_says_nothing(said):
    for method in ("ppo", "grpo"):
        signs = watch(method)
        for _ in range(20):
            signs.see(GOOD, DIFFERENT)
        signs.finish()
    watch().finish()
    assert said() == []


def test_group_methods_compare_within_a_prompt(said):
    assert nothing_compares(SAME_IN_GROUPS, is_grouped=True)
    assert not nothing_compares(SAME_IN_GROUPS, is_grouped=False)
    assert not nothing_compares(rows([1.0], [1.0]), is_grouped=True)  # nothing to compare with
    assert not nothing_compares(rows([1.0]), is_grouped=False)
    for method, times in (("ppo", 0), ("grpo", 1), ("rrhf", 2)):
        signs = watch(method)
        for _ in range(3):
            signs.see(GOOD, SAME_IN_GROUPS)
        assert len(said()) == times
    assert "all responses to a prompt got the same score, so" in said()[-1]
