"""Writes the page of a study: the gains of each method over seeds, and the claims they allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rrhf.evaluation.measure import CONFIDENCE
from rrhf.report.claims import holm
from rrhf.report.study_curves import (
    Training,
    gao_table,
    kl_table,
    responses_table,
    seconds_table,
)
from rrhf.report.study_spread import spread_table
from rrhf.report.study_table import Series, spread
from rrhf.report.table import NOTHING, column_of, format_estimate, format_number, markdown_lines
from rrhf.report.two_level import Difference

SHOWN = ("win_gold", "reward", "kl", "length", "ppl_reference")


@dataclass(frozen=True)
class WorldResults:
    """The results of a study on one world.

    Attributes:
        name: the world's name.
        seeds: numbers of the seeds.
        num_prompts: number of held-out prompts on each seed.
        series: key of a method -> its results by seed, SFT first.
        trainings: the methods' curves.
        trials: method -> its trials, as in the log of the tuning.
        covariates: name -> a value for each seed.
    """

    name: str
    seeds: Sequence[int]
    num_prompts: int
    series: Mapping[str, Series]
    trainings: Sequence[Training] = ()
    trials: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    covariates: Mapping[str, Sequence[float | None]] = field(default_factory=dict)


def world_part(results: WorldResults, baseline: str, rival: str) -> list[str]:
    """Write the paragraphs about one world.

    Args:
        results: the results on the world.
        baseline, rival: the two methods that all others are compared with.
    """
    series = results.series
    first, second = series[baseline], series[rival]
    seeds = results.seeds
    numbers = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else str(seeds[0])
    about = (
        f"Seeds {numbers}: other data, tokenizer, SFT policy and reward model each, which the "
        f"methods of one seed share. {results.num_prompts} held-out prompts a seed. Mean [95 % "
        "interval over seeds and prompts]; differences are paired by seed and prompt."
    )
    return [
        f"## {results.name}",
        about,
        gains_table(series, first, second),
        f"### Against {first.title} and {second.title}",
        "Each method's gold minus that of the other; a difference counts as shown if its 95 % "
        f"interval excludes zero after Holm's correction for {len(series) - 1} comparisons.",
        _list([*claims(series, first), *claims(series, second)]),
        *curve_part(results.trainings),
        "### Gold by seed",
        by_seed_table(seeds, series),
        "### What goes with the differences between seeds",
        "Correlations of a method's gold with other quantities, over seeds [95 % interval]; the "
        "last column names the parts of its responses that vary most closely with its gold.",
        spread_table(series, results.covariates),
        "### Trials",
        "Every method had four trials on seeds 10 and 11, from which no result is taken; the trial "
        "with the highest mean gold is bold and is what the seeds above were trained with.",
        trials_table(results.trials, {key: one.title for key, one in series.items()}),
    ]


def curve_part(trainings: Sequence[Training]) -> list[str]:
    """Write the paragraphs that compare curves; none without a curve."""
    longer = [training for training in trainings if training.has_points]
    if not longer:
        return []
    rival = longer[0].title
    return [
        "### At equal KL from SFT",
        "Gold where a method's curve first reaches the KL, interpolated in its square root between "
        "the policies kept on the way (for offline objectives: between SFT and the last policy). A "
        "seed that never reaches the KL has no value there. The KL of best-of-N is its upper bound "
        "log N - (N - 1)/N.",
        kl_table(trainings, rival),
        "### After equally many responses drawn and scored",
        responses_table(longer, rival),
        "### After equal processor time",
        "Seconds of one thread after SFT and reward model; between known points they are "
        "interpolated.",
        seconds_table(longer, rival),
        "### Where gold bends",
        "Gain of gold over SFT, fitted for each seed with the forms of Gao et al. 2022 "
        "(arXiv:2210.10760), d = sqrt(KL): d (alpha - beta d) for best-of-N, "
        "d (alpha - beta log d) for trained policies. Gold is said to fall where the slope's "
        "interval lies below zero.",
        gao_table(longer),
    ]


def gains_table(series: Mapping[str, Series], first: Series, second: Series) -> str:
    """Format a table of every method: gold, its differences from two methods, other metrics,
    costs."""
    measured = [metric for metric in SHOWN if _has(series, metric)]
    headings = [
        "",
        "gold ↑",
        f"minus {first.title}",
        f"minus {second.title}",
        "win at equal length ↑",
        *(column_of(metric).heading for metric in measured),
        "responses",
        "CPU seconds",
    ]
    lines = []
    for one in series.values():
        lines.append(
            [
                one.title,
                _cell(one.mean("gold")),
                *("" if one is other else _cell(one.minus(other)) for other in (first, second)),
                _cell(one.win_at_equal_length(series["sft"])),
                *(_number(one, metric) for metric in measured),
                format_number(one.cost.responses, 0),
                format_number(one.cost.cpu_seconds, 0),
            ]
        )
    return markdown_lines(headings, lines)


def claims(series: Mapping[str, Series], other: Series) -> list[str]:
    """Return a claim about each method against one method, corrected for multiple comparisons."""
    differences = {one.title: one.minus(other) for one in series.values() if one is not other}
    adjusted = holm([found.p_value for found in differences.values()])
    groups: dict[str, list[str]] = {"above": [], "below": [], "": []}
    for (title, found), p in zip(differences.items(), adjusted, strict=True):
        is_shown = found.mean is not None and p is not None and p < 1 - CONFIDENCE
        side = ("above" if found.mean > 0 else "below") if is_shown and found.mean else ""
        groups[side].append(f"{title} {_cell(found)}")
    lines = [
        f"{side.capitalize()} {other.title}: {', '.join(names)}."
        for side, names in groups.items()
        if side and names
    ]
    if groups[""]:
        lines.append(f"No difference to {other.title} is shown: {', '.join(groups[''])}.")
    return lines


def by_seed_table(seeds: Sequence[int], series: Mapping[str, Series]) -> str:
    """Format a table of gold by seed, with the standard deviation over seeds."""
    lines = []
    for one in series.values():
        told = [*one.means(), spread(one.means())]
        lines.append([one.title, *(NOTHING if x is None else format_number(x, 2) for x in told)])
    return markdown_lines(["", *map(str, seeds), "sd"], lines)


def axis_table(series: Mapping[str, Mapping[str, Series]]) -> str:
    """Format a table of gold with a row for each value of an axis and a column for each method.

    If fine-tuning on the best is among the methods, a last column gives what the ranking term adds:
    RRHF minus that method.

    Args:
        series: value -> method -> series.
    """
    methods = next(iter(series.values()))
    adds = {"rrhf", "best-of-n-sft"} <= methods.keys()
    headings = [
        "",
        *(one.title for one in methods.values()),
        *(["ranking term adds"] if adds else []),
    ]
    lines = []
    for value, of_value in series.items():
        cells = [_cell(one.mean("gold")) for one in of_value.values()]
        if adds:
            cells.append(_cell(of_value["rrhf"].minus(of_value["best-of-n-sft"])))
        lines.append([value, *cells])
    return markdown_lines(headings, lines)


def trials_table(
    trials: Mapping[str, Sequence[Mapping[str, Any]]], titles: Mapping[str, str]
) -> str:
    """Format a table of every trial with its gold on each tuning seed; chosen trials are bold."""
    lines = []
    for key, of_method in trials.items():
        for trial in of_method:
            words = ", ".join(f"{name} {value:g}" for name, value in trial["settings"].items())
            gold = " ".join(format_number(x, 2) for x in trial["gold"])
            kl = " ".join(format_number(x, 1) for x in trial["kl"])
            bold = "**" if trial.get("chosen") else ""
            lines.append([titles.get(key, key), f"{bold}{words}{bold}", gold, kl])
    return markdown_lines(["", "settings", "gold by seed", "KL by seed"], lines)


def _has(series: Mapping[str, Series], metric: str) -> bool:
    rows = (row for one in series.values() for row in one.rows if row is not None)
    return any(metric in row["metrics"] for row in rows)


def _cell(found: Difference) -> str:
    return format_estimate(found.as_dict(), 2)


def _number(one: Series, metric: str) -> str:
    """Return the mean of a metric; for best-of-N, whose KL cannot be sampled, the bound on its
    KL."""
    found, digits = one.mean(metric).mean, column_of(metric).digits
    if found is None and metric == "kl" and (bound := one.mean("kl_bound").mean) is not None:
        return f"≤ {format_number(bound, digits)}"
    return NOTHING if found is None else format_number(found, digits)


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
