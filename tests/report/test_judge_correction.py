"""Corrected win rates: coverage in simulated studies, hand-made numbers, and `rrhf compare`."""

import itertools
import json
import re

import numpy as np
import pytest
from test_compare import VALUES, row, save

from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import Measure
from rrhf.report.corrected_wins import calibration_of, corrected_page, corrected_rows
from rrhf.report.judge_correction import (
    Calibration,
    Share,
    calibrate,
    calibrate_pairs,
    corrected_win_rate,
)

STUDIES = 1000


def verdicts(random, wins, losses, sensitivity, specificity, ties):
    """Verdicts on truly won and then on truly lost items; a share of them are ties instead."""
    size = wins + losses
    right = np.concatenate([np.full(wins, sensitivity), np.full(losses, 1 - specificity)])
    drawn = np.where(random.random(size) < ties, 0.5, random.random(size) < right)
    return drawn.tolist()


@pytest.mark.parametrize(
    "theta, sensitivity, specificity, items, calibration_items, ties",
    [
        (0.5, 0.8, 0.8, 200, 200, 0.0),
        (0.7, 0.9, 0.65, 300, 100, 0.2),
        (0.2, 0.75, 0.7, 500, 100, 0.0),
        (0.9, 0.85, 0.9, 100, 400, 0.3),
    ],
)
def test_intervals_cover_the_truth_in_a_thousand_simulated_studies(
    theta, sensitivity, specificity, items, calibration_items, ties
):
    """The standard error of a share of .95 over 1000 studies is .007. The controls: the interval
    of the uncorrected rate, and the corrected one as if the judge's mistakes were known exactly."""
    random = np.random.default_rng(items)
    covered = exact = plain = 0
    for _ in range(STUDIES):
        wins = random.binomial(items, theta)
        found = verdicts(random, wins, items - wins, sensitivity, specificity, ties)
        truth = (random.random(calibration_items) < 0.5).astype(float)
        better = int(truth.sum())
        known = verdicts(random, better, calibration_items - better, sensitivity, specificity, ties)
        result = corrected_win_rate(found, calibrate(known, sorted(truth, reverse=True)))
        covered += result.low <= theta <= result.high
        reach = 1.96 * np.std(found) / items**0.5
        plain += abs(np.mean(found) - theta) <= reach
        gain = result.sensitivity + result.specificity - 1
        exact += abs(result.mean - theta) <= reach / gain
    assert 0.93 <= covered / STUDIES <= 0.97
    assert min(plain, exact) / STUDIES < 0.9


def test_pairs_without_a_side_cover_as_well():
    """Sensitivity = specificity = accuracy, .75, known from 150 pairs."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(STUDIES):
        wins = random.binomial(250, 0.65)
        found = verdicts(random, wins, 250 - wins, 0.75, 0.75, 0.1)
        result = corrected_win_rate(found, calibrate_pairs(verdicts(random, 150, 0, 0.75, 0, 0.1)))
        covered += result.low <= 0.65 <= result.high
    assert 0.93 <= covered / STUDIES <= 0.97


def test_hand_made_numbers():
    # sensitivity 9/10, specificity 8/10, p = 6/10: (.6 + .8 - 1) / (.9 + .8 - 1) = 4/7.
    calibration = calibrate([1] * 9 + [0] + [0] * 8 + [1] * 2 + [1], [1] * 10 + [0] * 10 + [0.5])
    assert (calibration.sensitivity, calibration.specificity) == (0.9, pytest.approx(0.8))
    assert calibration.ties == 1
    found = corrected_win_rate([1] * 6 + [0] * 4, calibration)
    assert found.mean == pytest.approx(4 / 7)
    assert found.low < 4 / 7 < found.high
    assert (found.n, found.judged, found.calibration_items) == (10, 0.6, 20)
    # Ties in the verdicts lower both: sensitivity (8 + 1) / 10 from 8 wins and 2 ties.
    assert calibrate([1] * 8 + [0.5] * 2 + [0], [1] * 10 + [0]).sensitivity == pytest.approx(0.9)


def test_fewer_calibration_items_give_a_wider_interval():
    widths = []
    for count in (10, 40, 400):
        known = [1, 1, 1, 1, 0] * (count // 10) + [0, 0, 0, 0, 1] * (count // 10)
        truth = [1] * (count // 2) + [0] * (count // 2)
        found = corrected_win_rate([1, 0, 1] * 40, calibrate(known, truth))
        widths.append(found.high - found.low)
    assert widths[0] > 1.5 * widths[1] > 2 * widths[2]


def test_a_perfect_judge_leaves_the_rate_unchanged():
    found = corrected_win_rate(
        [1] * 60 + [0] * 40, calibrate([1] * 500 + [0] * 500, [1] * 500 + [0] * 500)
    )
    assert found.mean == pytest.approx(0.6)
    assert 0.49 < found.low < 0.6 < found.high < 0.71


@pytest.mark.parametrize(
    "known, truth",
    [
        ([1, 0, 1, 0], [1, 1, 0, 0]),  # at chance
        ([0.5] * 4, [1, 1, 0, 0]),  # nothing but ties
        ([0, 0, 1, 1], [1, 1, 0, 0]),  # always wrong
    ],
)
def test_a_judge_at_chance_is_refused(known, truth):
    with pytest.raises(UserError, match="as by chance, so its verdicts say nothing"):
        corrected_win_rate([1, 0], calibrate(known, truth))


def test_a_judge_that_cannot_be_told_from_chance_has_the_whole_interval():
    found = corrected_win_rate([1, 0, 1], calibrate([1, 1, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0]))
    assert (found.low, found.high) == (0, 1)


@pytest.mark.parametrize(
    "truth, missing",
    [([], "better"), ([0, 0], "better"), ([1, 1], "worse"), ([0.5, 0.5], "better")],
)
def test_a_calibration_without_one_kind_of_items_is_refused(truth, missing):
    with pytest.raises(UserError, match=f"in none of {len(truth)} .* truly {missing}"):
        calibrate([1.0] * len(truth), truth)


def test_no_pairs_and_no_verdicts_are_refused():
    with pytest.raises(UserError, match="no calibration item"):
        calibrate_pairs([])
    with pytest.raises(UserError, match="no verdict to correct"):
        corrected_win_rate([], Calibration(Share.of([1.0], 1), Share.of([0.0], 1)))


def test_every_interval_lies_in_0_to_1_and_holds_its_estimate():
    """All small counts; the ends of many intervals, and estimates, lie outside before they are
    limited. A judge is refused exactly where sensitivity + specificity is 1 or less."""
    refused = 0
    for wins, right, wrong in itertools.product(range(6), range(6), range(6)):
        known = [1] * right + [0] * (5 - right) + [1] * wrong + [0] * (5 - wrong)
        calibration = calibrate(known, [1] * 5 + [0] * 5)
        if right <= wrong:
            refused += 1
            with pytest.raises(UserError, match="as by chance"):
                corrected_win_rate([1] * wins + [0] * (5 - wins), calibration)
            continue
        found = corrected_win_rate([1] * wins + [0] * (5 - wins), calibration)
        assert 0 <= found.low <= found.mean <= found.high <= 1 and found.low < found.high
        limited = min(max((wins - wrong) / (right - wrong), 0), 1)
        assert found.mean == pytest.approx(limited)
    assert refused == 6 * 21


def judged_row(name, wins, gold=None, scorer="judge"):
    others = {"win_reward": Measure(wins)} | ({"win_gold": Measure(gold)} if gold else {})
    return row(name, VALUES, made_with={"scorer": scorer}, **others)


def test_compare_shows_corrected_win_rates(tmp_path, capsys):
    """Sensitivity .8, specificity 1, judged .4: (.4 + 1 - 1) / (.8 + 1 - 1) = .5."""
    ids = list(VALUES)
    wins = {p: float(place < 12) for place, p in enumerate(ids)}
    known = {f"known {i}": float(i < 8) for i in range(20)}
    gold = {f"known {i}": float(i < 10) for i in range(20)}
    rows = save(tmp_path / "rows", judged_row("sft", wins), judged_row("rank", wins))
    calibration = save(tmp_path / "known", judged_row("known", known, gold)) + "/known.json"
    table = tmp_path / "table.md"
    words = ["compare", rows, "--judge_calibration", calibration, "--output", str(table)]
    assert main([*words, "--baseline", "sft"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"rank +0.40 +0.50 \[0\.\d\d, 0\.\d\d\]", shown)
    assert "sensitivity 0.800 and specificity 1.000 on 20 calibration items" in shown
    assert re.search(r"\| rank \| 0.40 \| 0.50 \[", table.read_text())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scorer": "another"}, "the win rate of 'rank' is by judge, but 'known' measured another"),
        ({"gold": None}, "does not say what the judge gets wrong"),
        ({"wins": {f"known {i}": 0.5 for i in range(20)}}, "as by chance"),
    ],
)
def test_compare_refuses_a_calibration_that_does_not_fit(tmp_path, capsys, changes, message):
    known = {f"known {i}": float(i < 8) for i in range(20)}
    gold = {f"known {i}": float(i < 10) for i in range(20)}
    calibration = judged_row("known", **({"wins": known, "gold": gold} | changes))
    save(tmp_path / "known", calibration)
    rows = save(tmp_path / "rows", judged_row("rank", dict.fromkeys(VALUES, 1.0)))
    known_row = str(tmp_path / "known" / "known.json")
    assert main(["compare", rows, "--judge_calibration", known_row]) == 2
    assert message in capsys.readouterr().err


def test_prompts_of_the_calibration_are_not_evaluated():
    known = {f"known {i}": float(i < 8) for i in range(20)}
    calibration = judged_row("known", known, {p: float(n < 10) for n, p in enumerate(known)})
    evaluated = dict.fromkeys([*VALUES, "known 3", "known 7"], 1.0)
    message = rf"2 of the {len(evaluated)} prompts of 'rank' are in 'known' too \(first: known 3\)"
    with pytest.raises(UserError, match=message):
        corrected_rows([judged_row("rank", evaluated)], calibration)


def test_a_page_tells_how_many_calibration_items_are_ties():
    known = {f"known {i}": float(i < 10) for i in range(23)}
    gold = {p: 1.0 if n < 10 else 0.5 if n > 19 else 0.0 for n, p in enumerate(known)}
    calibration = judged_row("known", known, gold)
    found = corrected_rows([judged_row("rank", dict.fromkeys(VALUES, 1.0))], calibration)
    page = corrected_page(found, lambda headings, cells: "")
    assert "on 20 calibration items (3 more are truly ties, and left out), whose own" in page


def test_shares_of_wins_over_several_responses_are_no_verdicts():
    made = row("judge", VALUES, accuracy=Measure({f"known {i}": float(i > 1) for i in range(20)}))
    made["scorer"] = {"name": "judge:pairwise:m", "is_relative": True}
    made["counts"] = {"rows": 20, "responses": 41}
    with pytest.raises(UserError, match="calibrate with data of two responses to each prompt"):
        calibration_of(made)
    calibration_of({**made, "counts": {"rows": 20, "responses": 40}})
    calibration_of({**made, "scorer": {"name": "judge:rubric:m", "is_relative": False}})


def test_rows_of_several_seeds_are_refused():
    known = {f"known {i}": float(i < 8) for i in range(20)}
    calibration = judged_row("known", known, {f"known {i}": float(i < 10) for i in range(20)})
    rows = [{**judged_row("rank", known), "by_seed": {}}]
    with pytest.raises(UserError, match="leave out --over_seeds"):
        corrected_rows(rows, calibration)
    with pytest.raises(UserError, match="no row has a win rate"):
        corrected_rows([row("gold only", VALUES)], calibration)


def test_compare_calibrates_with_a_row_of_evaluate_reward(tmp_path, capsys):
    """Accuracy .9 of 200 pairs, judged 1: (1 + .9 - 1) / (.9 + .9 - 1) > 1, so 1."""
    made = row(
        "judge", VALUES, accuracy=Measure({f"known {i}": float(i % 10 > 0) for i in range(200)})
    )
    made["scorer"] = {"name": "judge"}
    (tmp_path / "judge.json").write_text(json.dumps(made))
    rows = save(tmp_path / "rows", judged_row("rank", dict.fromkeys(VALUES, 1.0)))
    assert main(["compare", rows, "--judge_calibration", str(tmp_path / "judge.json")]) == 0
    assert re.search(r"rank +1.00 +1.00 \[0\.[89]\d, 1.00\]", capsys.readouterr().out)
