"""`rrhf evaluate-reward`: scores responses whose order is known, and measures each scorer.

Each scorer gets a row, a JSON file in the form of `rrhf evaluate`'s rows, so that `rrhf compare`
reads them too; its scores are in the candidate file next to it. Scorers are loaded one after the
other, the baseline first, and each row is written as soon as it is measured. Differences from the
baseline are paired: the same prompts are resampled for both.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import rrhf
from rrhf.data.formats import SourceCounts
from rrhf.data.mixing import load_sets
from rrhf.data.views import ranked_groups
from rrhf.ensemble_names import parse_ensemble
from rrhf.errors import UserError
from rrhf.evaluation.baseline import policy_name
from rrhf.evaluation.bootstrap import estimate, paired_difference
from rrhf.evaluation.inputs import choose
from rrhf.evaluation.measure import Measure, mean_measure
from rrhf.evaluation.results import (
    SCHEMA_VERSION,
    file_stem,
    measure_to_json,
    require_free_place,
    save_row,
)
from rrhf.evaluation.reward import score_sets
from rrhf.evaluation.scorers.config import EvaluateRewardConfig
from rrhf.evaluation.scorers.measures import COLUMNS, Value, best_of_k, bin_sums, measures
from rrhf.evaluation.scorers.ranked import RankedSet, by_prompt
from rrhf.evaluation.shared import fingerprint
from rrhf.files import made_folder
from rrhf.model_paths import accept_edited_models
from rrhf.records import CandidateSet
from rrhf.scoring.build import build_scorer, check_scorer, is_made
from rrhf.scoring.settings_in_names import split_settings

logger = logging.getLogger(__name__)

Row = dict[str, Any]


def evaluate_rewards(config: EvaluateRewardConfig) -> list[Row]:
    """Measure each scorer and write its row; return the rows in the order of the scorers.

    Raises:
        UserError: a scorer or the data is missing or does not fit, or nothing in the data has an
            order.
    """
    accept_edited_models(config)
    names = row_names(config)
    base = config.baseline or names[0]
    if base not in names:
        raise UserError(f"--baseline {base}: no scorer has this name; choose {', '.join(names)}")
    for spec in config.scorers:
        check_scorer(spec, config)
    for name in names:
        require_free_place(name, config.output_dir, "give --names, or another --output_dir")
    rows: dict[str, Row] = {}
    with made_folder(config.output_dir):
        counts = SourceCounts()
        sets = load_ranked(config, counts)
        measured: dict[str, dict[str, Value]] = {}
        specs = dict(zip(names, config.scorers, strict=True))
        for name in sorted(names, key=lambda name: name != base):
            row, values, scored = _measure(name, specs[name], sets, config)
            measured[name] = values
            row["data"] = counts.as_dict()
            if name != base:
                row["differences"] = _differences(values, measured[base], config)
                row["baseline"] = base
            save_row(row, scored, config.output_dir)
            rows[name] = row
    return [rows[name] for name in names]


def row_names(config: EvaluateRewardConfig) -> list[str]:
    """Return the scorers' names: those that the user gave, or else `scorer_label` of each.

    Raises:
        UserError: two scorers would have the same name, or the same files.
    """
    names = config.names or [scorer_label(spec) for spec in config.scorers]
    stems = [file_stem(name) for name in names]
    for number, stem in enumerate(stems):
        if stem in stems[:number]:
            raise UserError(
                f"two scorers are called {names[number]!r}; give each its own name: --names "
                f"{' '.join(f'{name}-{place + 1}' for place, name in enumerate(stems))}"
            )
    return names


def scorer_label(spec: str) -> str:
    """Return a short name for a scorer, without its settings; for a reward model, the name of its
    run or folder."""
    if ensemble := parse_ensemble(spec):
        members = (scorer_label(member.scorer) for member in ensemble.members)
        return f"{ensemble.rule} of {', '.join(members)}"
    if is_made(spec):
        plain, settings = split_settings(spec)
        return f"{plain}:{settings['model']}" if "model" in settings else plain
    name = policy_name(spec)
    folder = Path(spec)
    is_in_run = name == "reward_model" and folder.exists()
    return folder.resolve().parent.name if is_in_run else name


def load_ranked(config: EvaluateRewardConfig, counts: SourceCounts) -> list[CandidateSet]:
    """Load the rows in which one response is better than another.

    Raises:
        UserError: there is no such row.
    """
    loaded = load_sets(config.data_path, split=config.split, counts=counts, options=config)
    groups = choose(ranked_groups(loaded, counts), config.num_prompts)
    kept = [s for s in groups if len(set(s.scores)) > 1]
    if without := len(groups) - len(kept):
        what = "rows left out: no response is better than another"
        logger.info("%s: %d %s", config.data_path, without, what)
        counts.dropped["no_ordered_pair"] += without
    if not kept:
        raise UserError(
            f"{config.data_path}: in none of {len(loaded)} rows is one response better than "
            "another; use data with pairs, with scores or ranks, or with chosen and rejected "
            "responses"
        )
    return kept


def _measure(
    name: str, spec: str, sets: Sequence[CandidateSet], config: EvaluateRewardConfig
) -> tuple[Row, dict[str, Value], list[CandidateSet]]:
    """Score the responses; return the row without differences, its values and the scored sets."""
    scorer = build_scorer(spec, config)
    scored = score_sets(scorer, sets, config.max_unscored_fraction)
    ranked = [RankedSet.of(*both) for both in zip(sets, scored, strict=True)]
    values = measures(ranked, scorer.logits_per_unit, config.calibration_bins)
    estimated = partial(
        estimate, confidence=config.confidence, resamples=config.bootstrap_resamples
    )
    metrics = {metric: estimated(value).as_dict() for metric, value in values.items()}
    metrics = {metric: one for metric, one in metrics.items() if one["mean"] is not None}
    unscored = sum(s.scores.count(None) for s in scored)
    row: Row = {
        "schema_version": SCHEMA_VERSION,
        "rrhf_version": rrhf.__version__,
        "name": name,
        "metrics": metrics,
        "reliability": _reliability(ranked, scorer.logits_per_unit, config),
        "subsets": _subsets(ranked, config),
        "counts": {
            "rows": len(ranked),
            "responses": sum(len(s.candidates) for s in scored),
            "responses_without_score": unscored,
            "rows_without_order_left": sum(not one.has_order for one in ranked),
            "pairs": sum(len(one.pairs[0]) for one in ranked if one.has_order),
        },
        "chance_best_of_k": _chance(ranked),
        "scorer": {
            **scorer.describe(),
            "logits_per_unit": scorer.logits_per_unit,
            "is_relative": scorer.is_relative,
        },
        "made_with": {
            "prompts": _digest(sets),
            "num_prompts": len({one.prompt for one in ranked}),
            "decoding": {"kind": "ranked"},
            "confidence": config.confidence,
            "calibration_bins": config.calibration_bins,
        },
        "per_prompt": {
            metric: measure_to_json(value)
            for metric, value in values.items()
            if isinstance(value, Measure) and value.values
        },
        "columns": {metric: asdict(column) for metric, column in COLUMNS.items()},
        "config": {"scorer": spec, "data_path": config.data_path},
    }
    return row, values, scored


def _differences(
    values: Mapping[str, Value], baseline: Mapping[str, Value], config: EvaluateRewardConfig
) -> dict[str, Any]:
    """Return the paired differences from the baseline, of every column that shows gains."""
    found = {
        metric: paired_difference(
            value, baseline[metric], config.confidence, config.bootstrap_resamples
        ).as_dict()
        for metric, value in values.items()
        if metric in baseline and COLUMNS[metric].gain
    }
    return {metric: one for metric, one in found.items() if one["mean"] is not None}


def _reliability(
    sets: Sequence[RankedSet], logits_per_unit: float, config: EvaluateRewardConfig
) -> list[dict[str, Any]]:
    """Return the reliability table: in each bin, the mean probability and the accuracy.

    Bins without a pair are left out. `share` is the bin's share of the prompts' pairs.
    """
    bins, sums = config.calibration_bins, bin_sums(sets, logits_per_unit, config.calibration_bins)
    found = []
    for place in range(bins):
        part = {prompt: one[:, place] for prompt, one in sums.items() if one[0, place] > 0}
        if not part:
            continue
        weights = {prompt: float(one[0]) for prompt, one in part.items()}
        right = Measure({prompt: float(one[2]) for prompt, one in part.items()}, weights)
        total = np.sum(list(part.values()), axis=0)
        found.append(
            {
                "from": 0.5 + place / bins / 2,
                "to": 0.5 + (place + 1) / bins / 2,
                "share": float(total[0]) / len(sums),
                "probability": float(total[1] / total[0]),
                "accuracy": estimate(
                    right, config.confidence, config.bootstrap_resamples
                ).as_dict(),
            }
        )
    return found


def _subsets(sets: Sequence[RankedSet], config: EvaluateRewardConfig) -> dict[str, Any]:
    """Return accuracy and best of K of each subset, if the data has several subsets."""
    names = sorted({s.subset for s in sets})
    found: dict[str, Any] = {}
    for name in names if len(names) > 1 else ():
        values: dict[str, dict[str, list[float]]] = {"best_of_k": {}, "accuracy": {}}
        for prompt, rows in by_prompt([s for s in sets if s.subset == name]):
            values["best_of_k"][prompt] = [best_of_k(row) for row in rows]
            values["accuracy"][prompt] = [x for row in rows for x in row.is_right.tolist()]
        found[name or "unknown"] = {
            metric: estimate(
                mean_measure(one), config.confidence, config.bootstrap_resamples
            ).as_dict()
            for metric, one in values.items()
        }
    return found


def _chance(sets: Sequence[RankedSet]) -> float | None:
    """Return the best of K that equal or random scores would reach; None without prompts."""
    shares = mean_measure(
        {prompt: [float(row.is_best.mean()) for row in rows] for prompt, rows in by_prompt(sets)}
    )
    known = list(shares.values.values())
    return sum(known) / len(known) if known else None


def _digest(sets: Sequence[CandidateSet]) -> str:
    """Return 16 hex digits that identify the prompts, the responses and their order."""
    order = "\n".join(f"{s.id} {s.scores}" for s in sorted(sets, key=lambda s: s.id))
    return hashlib.sha256(f"{fingerprint(sets)}\n{order}".encode()).hexdigest()[:16]
