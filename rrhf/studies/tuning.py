"""Chooses the settings of each method, with the same number of trials, on seeds kept for trials.

    seed-10/trials/dpo-1/dpo/     the training of one trial
    seed-10/trials/rows/          its row: gold, reward and KL on the held-out prompts of that seed
    tuning.json                   every trial with its gold on each seed, and which one was chosen

A trial is judged by its mean gold over the seeds. This is possible only in a world, where gold is
known; every method has the same advantage.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.files import make_folder, write_json
from rrhf.studies.change import Change
from rrhf.studies.config import TUNING_SEEDS
from rrhf.studies.grids import GRIDS, LATER_ROUNDS, Trial
from rrhf.studies.method_table import METHODS, ROUNDS
from rrhf.studies.rows import Row, RowPlan, evaluate_rows
from rrhf.studies.seeds import run_seeds, seed_folder
from rrhf.studies.stages import Stages

LOG = "tuning.json"
IN_ROUNDS = f"rrhf-{ROUNDS}"
"""The method on which the settings of later rounds are chosen."""

Settings = dict[str, Mapping[str, Any]]
"""Stage -> settings, as `Stages.settings`."""


def tuned(
    folder: Path,
    world: str,
    size: str,
    methods: Sequence[str],
    jobs: int = 0,
    say: Callable[[str], None] = print,
) -> Settings:
    """Run the trials that are missing, write the log, and return the settings that were chosen.

    Args:
        folder: the folder for the runs and the log.
        world: name of the world.
        size: name of the world's size.
        methods: keys of `METHODS`.
        jobs: as in `run_seeds`.
        say: called with lines of progress.
    """
    make_folder(folder)
    grids = {key: GRIDS[key] for key in methods if key in GRIDS}
    log: dict[str, list[dict[str, Any]]] = {}
    best = _run(folder, world, size, grids, {}, log, jobs, say)
    if any(key.startswith("rrhf-") for key in methods):
        _run(folder, world, size, {IN_ROUNDS: LATER_ROUNDS}, _by_stage(best), log, jobs, say)
    about = {"world": world, "size": size, "seeds": list(TUNING_SEEDS)}
    write_json(folder / LOG, {**about, "trials": log})
    return chosen_settings(folder, methods)


def chosen_settings(folder: Path, methods: Sequence[str]) -> Settings:
    """Return the chosen settings from the log; longer trainings use those of the usual training."""
    log = json.loads((folder / LOG).read_text())["trials"]
    best = {
        key: next(trial["settings"] for trial in trials if trial.get("chosen"))
        for key, trials in log.items()
    }
    rounds = best.pop(IN_ROUNDS, None)
    chosen = _by_stage(best)
    if rounds is not None:
        chosen["later_rounds"] = rounds
    for key in methods:
        if key.endswith("-long"):
            chosen[key] = chosen[METHODS[key.removesuffix("-long")].policy]
    return chosen


def _by_stage(best: Mapping[str, Trial]) -> Settings:
    return {METHODS[key].policy: trial for key, trial in best.items()}


def _run(
    folder: Path,
    world: str,
    size: str,
    grids: Mapping[str, Sequence[Trial]],
    settings: Settings,
    log: dict[str, list[dict[str, Any]]],
    jobs: int,
    say: Callable[[str], None],
) -> dict[str, Trial]:
    """Run the trials of some methods and add them to the log; return the best trial of each
    method."""
    run = partial(_seed_trials, folder, world, size, grids, settings)
    by_seed = run_seeds(run, TUNING_SEEDS, jobs, say)
    best = {}
    for key, trials in grids.items():
        rows = [[found[key][number] for found in by_seed] for number in range(len(trials))]
        log[key] = [
            {
                "settings": dict(trial),
                **{
                    metric: [row["metrics"][metric]["mean"] for row in of_trial]
                    for metric in ("gold", "reward", "kl")
                },
            }
            for trial, of_trial in zip(trials, rows, strict=True)
        ]
        gold = [statistics.mean(told["gold"]) for told in log[key]]
        number = gold.index(max(gold))
        log[key][number]["chosen"] = True
        best[key] = trials[number]
    return best


def _seed_trials(
    folder: Path,
    world: str,
    size: str,
    grids: Mapping[str, Sequence[Trial]],
    settings: Settings,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, list[Row]]:
    """Return the rows of all trials on one seed, by method."""
    study = Stages(seed_folder(folder, seed), world, size, seed, say)
    names = [(key, number) for key, trials in grids.items() for number in range(len(trials))]
    study.num_stages += sum(len(METHODS[key].stages) for key, _ in names)
    study.prepare()
    plan = []
    for key, number in names:
        method = METHODS[key]
        stage = "later_rounds" if key == IN_ROUNDS else method.policy
        change = Change({**settings, stage: grids[key][number]})
        branch = study.branched(f"trials/{key}-{number + 1}", change)
        for name in method.stages:
            branch.method_stage(name)
        policy = branch.place(method.policy).relative_to(study.folder)
        plan.append(RowPlan(f"{key} {number + 1}", str(policy)))
    rows = iter(
        evaluate_rows(
            study, plan, study.folder / "trials" / "rows", samples=1, has_likelihoods=False
        )
    )
    return {key: [next(rows) for _ in trials] for key, trials in grids.items()}
