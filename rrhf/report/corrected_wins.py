"""Shows the win rates by an imperfect judge, corrected by its mistakes, below `rrhf compare`'s
table.

The judge's mistakes are read from a row (`--judge_calibration`): a row of `rrhf evaluate` with win
rates by the judge and by gold, or a row of `rrhf evaluate-reward` with the judge's accuracy on
pairs. `rrhf.report.judge_correction` has the statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import CONFIDENCE
from rrhf.report.judge_correction import (
    Calibration,
    Corrected,
    calibrate,
    calibrate_pairs,
    corrected_win_rate,
)
from rrhf.report.table import format_estimate, format_number

Row = Mapping[str, Any]


def calibration_of(row: Row) -> tuple[str, Calibration]:
    """Read from a row which judge was measured, and its mistakes.

    Raises:
        UserError: the row holds no judge's results on responses whose order is known.
    """
    known = row["per_prompt"]
    if "win_gold" in known and "win_reward" in known:
        judged, true = known["win_reward"]["values"], known["win_gold"]["values"]
        both = [prompt for prompt in judged if prompt in true]
        found = calibrate([judged[p] for p in both], [true[p] for p in both])
        return str(row["made_with"]["scorer"]), found
    if "accuracy" in known and "scorer" in row:
        counts = row.get("counts", {})
        more = counts.get("responses", 0) > 2 * counts.get("rows", 0)
        if more and row["scorer"].get("is_relative"):
            raise UserError(
                f"--judge_calibration: in {row['name']!r}, the scores of {row['scorer']['name']} "
                "compare each response with several others, which says too much good of its "
                "verdicts on pairs; calibrate with data of two responses to each prompt"
            )
        found = calibrate_pairs(list(known["accuracy"]["values"].values()))
        return str(row["scorer"]["name"]), found
    raise UserError(
        f"--judge_calibration: the row {row['name']!r} does not say what the judge gets wrong; "
        "name a row of `rrhf evaluate` with --gold, --scorer JUDGE and --baseline, or of "
        "`rrhf evaluate-reward --scorers JUDGE`"
    )


def corrected_rows(rows: Sequence[Row], calibration: Row) -> dict[str, Corrected]:
    """Correct the win rates by reward; return row name -> result, for rows with such a win rate.

    Raises:
        UserError: a row is of several seeds, has another judge, or has prompts of the calibration;
            no row has a win rate; the judge is no better than chance; its mistakes are unknown.
    """
    judge, mistakes = calibration_of(calibration)
    used = calibration["per_prompt"].get("win_gold", calibration["per_prompt"].get("accuracy"))
    used = used["values"]
    found: dict[str, Corrected] = {}
    for row in rows:
        if "win_reward" not in row["per_prompt"]:
            continue
        if "by_seed" in row:
            raise UserError(
                "--judge_calibration corrects the win rates of single rows; leave out --over_seeds"
            )
        if (by := row["made_with"].get("scorer")) != judge:
            raise UserError(
                f"--judge_calibration: the win rate of {row['name']!r} is by {by}, but "
                f"{calibration['name']!r} measured {judge}; calibrate the same judge"
            )
        values = row["per_prompt"]["win_reward"]["values"]
        if both := [prompt for prompt in values if prompt in used]:
            raise UserError(
                f"--judge_calibration: {len(both)} of the {len(values)} prompts of {row['name']!r} "
                f"are in {calibration['name']!r} too (first: {both[0]}); calibrate on other prompts"
            )
        wins = list(values.values())
        confidence = row["made_with"].get("confidence", CONFIDENCE)
        found[row["name"]] = corrected_win_rate(wins, mistakes, confidence)
    if not found:
        raise UserError(
            "--judge_calibration: no row has a win rate by a judge; evaluate with --scorer JUDGE "
            "and --baseline"
        )
    return found


def corrected_page(
    found: Mapping[str, Corrected], lines: Callable[[Sequence[str], Sequence[Sequence[str]]], str]
) -> str:
    """Format corrected win rates, and what the judge gets right."""
    headings = ["", "win (by the judge)", "win (corrected)"]
    cells = [
        [name, format_number(one.judged, 2), format_estimate(one.as_dict())]
        for name, one in found.items()
    ]
    first = next(iter(found.values()))
    ties = first.calibration_ties
    left_out = f" ({ties} more are truly ties, and left out)" if ties else ""
    return (
        f"{lines(headings, cells)}\nCorrected by the judge's sensitivity {first.sensitivity:.3f} "
        f"and specificity {first.specificity:.3f} on {first.calibration_items} calibration "
        f"items{left_out}, whose own error is part of the intervals.\n"
    )
