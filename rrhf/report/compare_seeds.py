"""`rrhf compare --over_seeds`: merges the rows of several training seeds into one row per method.

The seed of a row is the number after the word "seed" in its name ("PPO seed 3"), or else in the
path of its file (runs/seed-3/rows/PPO.json); the rest of the name is the method. Values and gains
are means over seeds, with intervals that cover other seeds and other prompts
(`rrhf.report.two_level`). Rows of the same seed must be measured in the same way; each seed may
have its own reward model, reference and baseline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import CONFIDENCE, Measure
from rrhf.evaluation.metrics import columns_of
from rrhf.evaluation.results import measure_from_json
from rrhf.report.agreement import mixed
from rrhf.report.claims import sentences
from rrhf.report.table import FACT_COLUMNS, fact_of
from rrhf.report.two_level import Difference, Estimate, minus, over_estimates, over_seeds

Row = dict[str, Any]

_NO_ROW: Row = {"per_prompt": {}}
_MOST_NATS = 100.0
"""A perplexity above e^100 counts as e^100, so that its square is finite."""
_SEED = re.compile(r"[ _.,-]*(?<![a-z])seed[ _=-]*(\d+)", re.IGNORECASE)


def named_by_method(row: Row, path: Path) -> Row:
    """Return the row under its method's name, with its `training_seed`.

    Raises:
        UserError: neither name nor path has a seed.
    """
    name = str(row["name"])
    in_name, in_path = _SEED.search(name), _SEED.findall(str(path.absolute()))
    if not in_name and not in_path:
        raise UserError(
            f"{path}: --over_seeds finds no training seed in the row's name ({name!r}) or in its "
            'path; evaluate it with a --name such as "PPO seed 3", or into a folder such as seed-3'
        )
    seed = in_name[1] if in_name else in_path[-1]
    method = _SEED.sub("", name).strip() or "policy"
    return {**row, "name": method, "training_seed": int(seed)}


def rows_over_seeds(groups: Mapping[int, Sequence[Row]]) -> list[Row]:
    """Merge rows into one row for each method; its entry `by_seed` holds the rows of the seeds.

    Args:
        groups: seed -> rows of this seed. If a method has no row for a seed, a note says so.

    Raises:
        UserError: there is only one seed.
    """
    if len(groups) < 2:
        raise UserError(
            f"--over_seeds: all rows are of seed {min(groups, default=0)}; name rows of several "
            "seeds, or leave --over_seeds out"
        )
    methods: dict[str, dict[int, Row]] = {}
    for seed, rows in sorted(groups.items()):
        for row in rows:
            methods.setdefault(row["name"], {})[seed] = row
    return [_merged(name, by_seed, sorted(groups)) for name, by_seed in methods.items()]


def mixed_over_seeds(groups: Mapping[int, Sequence[Row]]) -> list[str]:
    """Return the settings that differ between the rows of a seed, or between the seeds of a
    method."""
    lines = [f"seed {seed}: {line}" for seed, rows in groups.items() for line in mixed(rows)]
    methods: dict[str, list[Row]] = {}
    for seed, rows in groups.items():
        for row in rows:
            kept = {key: row["made_with"].get(key) for key in ("decoding", "confidence")}
            same = {"name": f"seed {seed}", "made_with": kept}
            methods.setdefault(row["name"], []).append(same)
    return lines + [f"{name}: {line}" for name, rows in methods.items() for line in mixed(rows)]


def gains_over_seeds(row: Row, baseline: Row) -> dict[str, Difference]:
    """Compute the gains of a merged row over another, by metric, paired by seed and prompt."""
    confidence = row["made_with"].get("confidence", CONFIDENCE)
    gains = {}
    for metric in row["per_prompt"]:
        ours, theirs = (_measures(one, metric) for one in (row, baseline))
        if any(theirs):
            pairs = zip(ours, theirs, strict=True)
            gains[metric] = over_estimates([_gain(a, b) for a, b in pairs], confidence)
    return gains


def claims_over_seeds(rows: Sequence[Row], baseline: Row) -> str:
    """Return a line for each method with the claim that its gain in gold allows (without gold: its
    gain in the table's first metric)."""
    confidence = baseline["made_with"].get("confidence", CONFIDENCE)
    gains = {
        (row["name"], baseline["name"]): gains_over_seeds(row, baseline)
        for row in rows
        if row is not baseline
    }
    columns = {m: column for m, column in columns_of(rows).items() if column.shown and column.gain}
    measured = [m for m in columns if any(m in found for found in gains.values())]
    metric = "gold" if "gold" in measured else measured[0]
    family = {names: found[metric] for names, found in gains.items() if metric in found}
    heading = columns[metric].heading.rstrip(" ↑↓")
    lines = sentences(family, confidence, columns[metric].digits)
    return "".join(f"- {heading}: {line}\n" for line in lines)


def about_seeds(row: Row, confidence: float) -> str:
    """Describe in one line what the numbers of merged rows are."""
    seeds = row["seeds"]
    prompts = sorted({one["made_with"]["num_prompts"] for one in row["by_seed"].values()})
    counts = str(prompts[0]) if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}"
    return (
        f"{len(seeds)} seeds ({', '.join(map(str, seeds))}) of {counts} prompts; brackets: "
        f"{confidence:.0%} intervals over seeds and prompts.\n"
    )


def _merged(name: str, by_seed: Mapping[int, Row], seeds: Sequence[int]) -> Row:
    first, every = next(iter(by_seed.values())), list(by_seed.values())
    merged: Row = {
        **first,
        **_mean_facts(every),
        "name": name,
        "metrics": {},
        "per_prompt": {metric: x for row in every for metric, x in row["per_prompt"].items()},
        "notes": _notes(by_seed, [seed for seed in seeds if seed not in by_seed]),
        "by_seed": dict(by_seed),
        "seeds": list(seeds),
    }
    confidence = first["made_with"].get("confidence", CONFIDENCE)
    for metric in dict.fromkeys(metric for row in every for metric in row["metrics"]):
        measures = _measures(merged, metric)
        if any(measures):
            found = over_estimates(
                [None if m is None else _metric(m, m.prompt_ids) for m in measures], confidence
            )
        else:  # one number for each seed, such as distinct-n
            values = [(row["metrics"].get(metric) or {}).get("mean") for row in every]
            found = over_seeds(values, (), confidence)
        merged["metrics"][metric] = found.as_dict()
    return merged


def _notes(by_seed: Mapping[int, Row], missing: Sequence[int]) -> list[str]:
    """Return the notes of all seeds; a note that not every seed has begins with its seeds."""
    having: dict[str, list[int]] = {}
    for seed, row in by_seed.items():
        for note in dict.fromkeys(row.get("notes", ())):
            having.setdefault(note, []).append(seed)
    notes = [
        note if len(seeds) == len(by_seed) else f"seed {', '.join(map(str, seeds))}: {note}"
        for note, seeds in having.items()
    ]
    return notes + [f"no row for seed {', '.join(map(str, missing))}"] * bool(missing)


def _measures(row: Row, metric: str) -> list[Measure | None]:
    """Return the metric's measure for each seed of the comparison; None = not measured."""
    values = [row["by_seed"].get(seed, _NO_ROW)["per_prompt"].get(metric) for seed in row["seeds"]]
    return [None if value is None else measure_from_json(value) for value in values]


def _gain(ours: Measure | None, theirs: Measure | None) -> Estimate | None:
    """Return the difference of two measures of one seed, over the prompts that both have."""
    if ours is None or theirs is None:
        return None
    shared = set(theirs.prompt_ids)
    ids = [p for p in ours.prompt_ids if p in shared]
    return minus(_metric(ours, ids), _metric(theirs, ids))


def _metric(measure: Measure, ids: Sequence[str]) -> Estimate | None:
    """Compute f(sum of values / sum of weights), and its derivative with respect to the weight of
    each prompt."""
    if not ids:
        return None
    weights = measure.weights or dict.fromkeys(ids, 1.0)
    total = math.fsum(weights[p] for p in ids)
    ratio = math.fsum(measure.values[p] for p in ids) / total
    value, slope = ratio, 1.0
    if measure.scale == "exp":
        value = slope = math.exp(min(ratio, _MOST_NATS))
    return value, {p: slope * (measure.values[p] - ratio * weights[p]) / total for p in ids}


def _mean_facts(rows: Sequence[Row]) -> Row:
    """Return the costs and facts of a merged row: means over its seeds, if all seeds have them."""
    means: dict[str, float] = {}
    for name in FACT_COLUMNS:
        found = [value for row in rows if (value := fact_of(row, name)) is not None]
        if len(found) == len(rows):
            means[name] = math.fsum(found) / len(found)
    return {
        "cost": {**means, "seconds": {"generation": means.get("generation_seconds")}},
        "training": {name.removeprefix("training_"): x for name, x in means.items()},
        "weight_distance": means.get("weight_distance"),
    }
