"""The scorers `length` and `repetition`, alone and in an ensemble."""

import pytest
from command_cases import error_of
from reward_cases import conversation
from score_cases import candidates_in

from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.scoring.build import build_scorer, check_scorer_place
from rrhf.scoring.config import RewardModelOptions


@pytest.mark.parametrize(
    "name, text, want",
    [
        ("length:4", "one two three four", 0.0),
        ("length:4", "", -1.0),
        ("length:4", "one\n two  three", -0.25),
        ("length:4", "a b c d e f g h", -1.0),
        ("length:2-4", "a b c", 0.0),
        ("length:2-4", "a", -0.25),
        ("length:2-4", "a b c d e f", -0.5),
        ("length:0-4", "", 0.0),
        ("repetition:1", "a b a b", -0.5),
        ("repetition:2", "A b a B a b", -0.6),  # ab ba ab ba ab: 2 of 5 are distinct
        ("repetition:2", "a b c d", 0.0),
        ("repetition:3", "a b", 0.0),
        ("repetition:3", "", 0.0),
        ("repetition:1", "no " * 100, -0.99),
    ],
)
def test_hand_made_scores(name, text, want):
    assert build_scorer(name).score([conversation("q", text)]) == [[pytest.approx(want)]]


@pytest.mark.parametrize(
    "name",
    ["length:", "length:0", "length:-3", "length:80-20", "length:ten", "length:1.5", "repetition:",
     "repetition:0", "repetition:-1", "repetition:two"],
)  # fmt: skip
def test_parameters_that_do_not_fit(name):
    with pytest.raises(UserError):
        check_scorer_place(name, RewardModelOptions())


def test_rules_as_members_of_an_ensemble(tmp_path):
    name = "sum:2*length:2-4@0/1,function:score_cases:length_of@0/10,0.5*repetition:1@0/1"
    scorer = build_scorer(name)
    # 2 * -3/4 + 7/10 + 0.5 * (1/7 - 1) for seven times the same letter.
    want = 2 * -0.75 + 1.3 + 0.5 * (1 / 7 - 1)
    assert scorer.score([conversation("q", "a a a a a a a")]) == [[pytest.approx(want)]]
    raw = candidates_in(tmp_path)
    assert main(["score", raw, f"{tmp_path}/out.jsonl", "--scorer", name]) == 0


def test_an_ensemble_written_as_a_call_is_told_the_form(tmp_path, capsys):
    words = ["score", candidates_in(tmp_path), f"{tmp_path}/out.jsonl", "--scorer"]
    said = error_of(capsys, *words, "mean(runs/a, length:4@0/1)")
    assert "write an ensemble as mean:runs/a,length:4@0/1" in said
