"""Does a small reward model know which reply people preferred, and better than counting words?

K folds of preference pairs, cut by the first human turn, so that no dialogue stands on both sides.
In each fold a reward model is trained on the others from every trunk that is named, next to two
plain rivals that see the reply alone: "the shorter reply is chosen", and a Bradley-Terry model on
hashed words and pairs of words. Every pair is tested once, in its own fold; a pair that a model
cannot read (it does not fit), and a tie, count one half. Intervals and differences are bootstrapped
over first human turns.

Results stand in `results.json` and `table.md`; a fold that is done is not done again. Texts of the
data are written to the folds' `train.jsonl` alone. Called as `python paper/hh_reward.py --data_path
PAIRS --output_dir OUT --trunks MODEL ...`; `--help` lists the settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from hh_baselines import (
    choose_l2,
    differences,
    fit_bradley_terry,
    shorter_is_chosen,
    verdict,
)

from rrhf.cli.main import exit_code_of
from rrhf.cli.places import read_settings
from rrhf.data.candidate_files import write_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, collate
from rrhf.data.columns import DataOptions
from rrhf.data.formats import SourceCounts
from rrhf.data.mixing import load_sets
from rrhf.data.views import first_turn, pairs, ranked_groups, split_by_first_turn
from rrhf.errors import EXIT_DONE, UserError
from rrhf.evaluation.bootstrap import Measure, estimate, paired_difference
from rrhf.files import make_folder, write_json
from rrhf.manifests import COMPLETE, read_manifest
from rrhf.models.loading import load_tokenizer, resolve_device
from rrhf.models.reward_layouts import build_reward_model
from rrhf.models.reward_model import RewardModel, load_reward_model
from rrhf.progress import Progress
from rrhf.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SEED, check_ranges
from rrhf.records import CandidateSet
from rrhf.runs import SETTINGS_FILE, settings_file
from rrhf.seals import EditedFiles
from rrhf.training.methods.fitting import RowFitter
from rrhf.training.methods.reward import RewardConfig, train
from rrhf.training.methods.reward_examples import PreferenceEncoder

logger = logging.getLogger(__name__)

SHORTER = "shorter reply"
NGRAMS = "n-gram Bradley-Terry"
RANGES = {
    "num_folds": "[2, inf)",
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "learning_rate": NOT_NEGATIVE,
    "model_max_length": "[2, inf)",
    "seed": SEED,
}


@dataclass
class HHRewardConfig(EditedFiles):
    """Reward models against plain baselines on preference pairs, in folds by first human turn."""

    data_path: str = field(metadata={"names": "data"})
    """Preference pairs, such as HH's harmless-base .jsonl.gz."""

    output_dir: str = field(metadata={"names": "output folder"})
    """Folder for the folds, results.json and table.md; a second call keeps finished folds."""

    trunks: list[str] = field(default_factory=list, metadata={"names": "model"})
    """Folders of language models to make reward models from; none = only the baselines."""

    num_folds: int = 5
    """Number of folds; each is tested once, by models trained on the others."""

    num_train_epochs: float = 1.0
    """Passes over the data in reward training."""

    per_device_train_batch_size: int = 16
    """Pairs in one forward."""

    learning_rate: float = 1e-3
    """Peak learning rate of reward training."""

    model_max_length: int = 256
    """Most tokens of prompt and reply; longer prompts lose turns, longer replies their end."""

    chat_format: Literal["auto", "raw", "hh", "alpaca", "chat_template"] = "hh"
    """How conversations are rendered for the reward models."""

    seed: int = 0
    """Seed of the folds, new heads and the order of the data."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        names = [Path(trunk).name for trunk in self.trunks]
        if len(set(names)) < len(names):
            raise UserError(f"--trunks {' '.join(names)}: two folders have the same name")


def run(config: HHRewardConfig) -> Path:
    """Do the folds that are missing and write the table; returns the results' path.

    Raises:
        UserError: data or a trunk is missing, or the folder was begun with other settings.
    """
    folder = Path(config.output_dir)
    settings = asdict(config)
    edited = settings.pop("accept_edited_files")
    _require_same_settings(folder, settings)
    counts = SourceCounts()
    found = pairs(
        load_sets(config.data_path, counts=counts, options=DataOptions(accept_edited_files=edited)),
        counts,
    )
    share = 1 / config.num_folds
    folds = split_by_first_turn(
        found, {str(number): share for number in range(config.num_folds)}, config.seed
    )
    make_folder(folder)
    write_json(folder / SETTINGS_FILE, settings)
    methods = [SHORTER, NGRAMS, *(Path(trunk).name for trunk in config.trunks)]
    results: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    with Progress("folds", config.num_folds * len(methods), "run") as progress:
        for number in range(config.num_folds):
            place = folder / f"fold-{number}"
            place.mkdir(exist_ok=True)
            test = list(folds[str(number)])
            rest = [s for other, part in folds.items() if other != str(number) for s in part]
            for method in methods:
                results[method].append(_one_fold(config, method, place, rest, test))
                progress.advance()
    summary = summarise(results, folds)
    summary["data"] = counts.as_dict()
    summary["config"] = asdict(config)
    write_json(folder / "results.json", summary)
    (folder / "table.md").write_text(table(summary), encoding="utf-8")
    return folder / "results.json"


def _require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """More trunks may be added later; what a fold depends on may not change."""
    if (place := settings_file(folder)) is not None:
        before = json.loads(place.read_text())
        for name, value in settings.items():
            if name != "trunks" and before.get(name) != value:
                raise UserError(
                    f"{folder}: was begun with {name} {before.get(name)!r}, now it is "
                    f"{value!r}; choose another --output_dir"
                )


def _one_fold(
    config: HHRewardConfig,
    method: str,
    place: Path,
    rest: Sequence[CandidateSet],
    test: Sequence[CandidateSet],
) -> dict[str, Any]:
    """What one method makes of one fold: {"correct": {pair id: 0, 0.5 or 1}, ...}."""
    done = place / f"{_file_name(method)}.json"
    if done.exists():
        result: dict[str, Any] = json.loads(done.read_text())
        return result
    if method == SHORTER:
        result = {"correct": {s.id: shorter_is_chosen(s) for s in test}}
    elif method == NGRAMS:
        l2 = choose_l2(rest, config.seed)
        weights = fit_bradley_terry(differences(rest), l2)
        leads = (differences(test) @ weights).tolist()
        result = {"correct": _by_id(test, leads), "l2": l2}
    else:
        trunk = next(trunk for trunk in config.trunks if Path(trunk).name == method)
        result = _reward_model(config, trunk, place / method, rest, test)
    write_json(done, result)
    logger.info("%s, %s: accuracy %.3f", place.name, method, _mean(result["correct"]))
    return result


def _reward_model(
    config: HHRewardConfig,
    trunk: str,
    place: Path,
    rest: Sequence[CandidateSet],
    test: Sequence[CandidateSet],
) -> dict[str, Any]:
    """Train one reward model, or go on training it, and test it."""
    place.mkdir(exist_ok=True)
    run_folder = place / "run"
    manifest = read_manifest(run_folder)
    if manifest is None or manifest.get("status") != COMPLETE:
        write_candidate_sets(place / "train.jsonl", rest)
        train(
            RewardConfig(
                trunk,
                str(run_folder),
                data_path=str(place / "train.jsonl"),
                validation_fraction=0.0,
                num_train_epochs=config.num_train_epochs,
                per_device_train_batch_size=config.per_device_train_batch_size,
                learning_rate=config.learning_rate,
                model_max_length=config.model_max_length,
                chat_format=config.chat_format,  # type: ignore[arg-type]
                long_responses="cut",
                regularization=0.001,
                weight_decay=0.01,
                group_by_length=True,
                seed=config.seed,
                logging_steps=10,
                save_steps=100,
                accept_edited_files=config.accept_edited_files,
                save_total_limit=1,
                resume_from_checkpoint=manifest is not None,
            )
        )
    folder = run_folder / "reward_model"
    codec = ChatCodec(load_tokenizer(folder), config.chat_format)
    encode = PreferenceEncoder(RowFitter(codec, config.model_max_length, None, "cut"))
    frozen = load_reward_model(folder).requires_grad_(False)
    model = build_reward_model(frozen.to(resolve_device()), "auto")  # type: ignore[arg-type]
    # Every test pair is a pair of marked replies, so its group is there, in the same place.
    leads = pair_leads(model, codec.pad_id, [encode(s) for s in ranked_groups(test)])
    manifest = read_manifest(run_folder) or {}
    return {
        "correct": _by_id(test, leads),
        "test_counts": dict(sorted(encode.counts.items())),
        "train_counts": manifest["data"]["examples"],
        "steps": manifest["steps"],
        "seconds": manifest["seconds"],
    }


@torch.inference_mode()
def pair_leads(
    model: RewardModel, pad_id: int, examples: Sequence[EncodedSet | None], batch_size: int = 32
) -> list[float]:
    """By how much each chosen reply's score leads; 0, a tie, where a pair does not fit."""
    leads = [0.0] * len(examples)
    device = next(model.parameters()).device
    places = [place for place, example in enumerate(examples) if example is not None]
    places.sort(key=lambda place: -examples[place].num_tokens)  # type: ignore[union-attr]
    for start in range(0, len(places), batch_size):
        mine = places[start : start + batch_size]
        batch = collate([e for place in mine if (e := examples[place])], pad_id).to(device)
        chosen, rejected = model(batch).view(-1, 2).unbind(1)
        for place, lead in zip(mine, (chosen - rejected).tolist(), strict=True):
            leads[place] = lead
    return leads


def _by_id(test: Sequence[CandidateSet], leads: Sequence[float]) -> dict[str, float]:
    return {s.id: verdict(lead) for s, lead in zip(test, leads, strict=True)}


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / max(len(values), 1)


def _file_name(method: str) -> str:
    return re.sub(r"[^\w.-]+", "-", method)


def summarise(
    results: dict[str, list[dict[str, Any]]], folds: dict[str, Sequence[CandidateSet]]
) -> dict[str, Any]:
    """Accuracy of each method over all folds with its interval, and its lead over the baselines."""
    turn_of = {
        s.id: hashlib.sha256(first_turn(s).encode("utf-8", "surrogatepass")).hexdigest()
        for part in folds.values()
        for s in part
    }
    measures: dict[str, Measure] = {}
    for method, found in results.items():
        correct: dict[str, float] = defaultdict(float)
        weights: dict[str, float] = defaultdict(float)
        for fold in found:
            for pair_id, value in fold["correct"].items():
                correct[turn_of[pair_id]] += value
                weights[turn_of[pair_id]] += 1
        measures[method] = Measure(correct, weights)
    rows: dict[str, Any] = {}
    for method, measure in measures.items():
        extra = [{k: v for k, v in fold.items() if k != "correct"} for fold in results[method]]
        rows[method] = {
            "accuracy": estimate(measure).as_dict(),
            "folds": [round(_mean(fold["correct"]), 4) for fold in results[method]],
            "ties": sum(v == 0.5 for fold in results[method] for v in fold["correct"].values()),
            "details": extra,
            "minus": {
                other: paired_difference(measure, measures[other]).as_dict()
                for other in (SHORTER, NGRAMS)
                if other != method
            },
        }
    return {"pairs": len(turn_of), "first_turns": len(set(turn_of.values())), "methods": rows}


def table(summary: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        f"{summary['pairs']} pairs, {summary['first_turns']} first human turns, "
        f"{summary['config']['num_folds']} folds; intervals: 95 %, bootstrap over first turns.",
        "",
        f"| method | accuracy | per fold | minus {SHORTER} | minus {NGRAMS} | ties |",
        "|-|-|-|-|-|-|",
    ]
    for method, row in summary["methods"].items():
        cells = [method, _with_interval(row["accuracy"])]
        cells.append(" ".join(f"{accuracy:.3f}" for accuracy in row["folds"]))
        cells += [
            _with_interval(row["minus"][other], "+.3f") if other in row["minus"] else ""
            for other in (SHORTER, NGRAMS)
        ]
        lines.append(f"| {' | '.join([*cells, str(row['ties'])])} |")
    return "\n".join(lines) + "\n"


def _with_interval(found: dict[str, Any], form: str = ".3f") -> str:
    if found["mean"] is None or found["low"] is None:
        return "-"
    low, high = (format(found[end], form) for end in ("low", "high"))
    return f"{found['mean']:{form}} [{low}, {high}]"


def main(argv: Sequence[str]) -> int:
    """What the command line does; returns the exit code."""
    print(f"Results: {run(read_settings(HHRewardConfig, argv, 'python paper/hh_reward.py'))}")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(sys.argv[1:])))
