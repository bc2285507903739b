"""Runs the study: equally many trials choose each method's settings, then every method is trained.

    WORLD/tuning/   the trials, on seeds 10 and 11
    WORLD/seed-12/  one seed: SFT policy, reward model, and every method from them

Finished stages are kept, so a stopped study goes on where it stopped, and a longer list of methods
or seeds adds only what is missing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.files import make_folder, replaced_file, write_json
from rrhf.report import study_table
from rrhf.report.study_curves import curve_numbers
from rrhf.report.study_figures import draw_differences
from rrhf.report.study_page import WorldResults, axis_table, world_part
from rrhf.report.study_table import Series, axis_numbers
from rrhf.report.training_cost import TrainingCost, mean_cost
from rrhf.studies.axes import AXES, run_axes
from rrhf.studies.config import StudyConfig
from rrhf.studies.curves import trainings
from rrhf.studies.method_table import METHODS
from rrhf.studies.methods_study import MethodsStudy, SeedResult
from rrhf.studies.seeds import run_seeds, seed_folder
from rrhf.studies.tuning import LOG, Settings, chosen_settings, tuned

logger = logging.getLogger(__name__)

ALWAYS = ("sft", "rrhf", "ppo")
"""Methods that every study includes, since the claims compare the others with these."""


PAGE, NUMBERS, PICTURE = "objectives.md", "objectives.json", "objectives.png"
AXES_PAGE, AXES_NUMBERS = "axes.md", "axes.json"
BASELINE, RIVAL = "rrhf", "ppo"
"""The methods that all others are compared with."""


class BriefStudy(MethodsStudy):
    """One seed of the study."""

    is_brief = True
    num_points = 10  # most of the KL comes early


def run(config: StudyConfig, say: Callable[[str], None] = logger.info) -> Path:
    """Run what is missing, then write page and numbers from the run folders; return the page."""
    target = Path(config.into or config.output_dir)
    make_folder(target)
    worlds = [_world_results(config, world, say) for world in config.worlds]
    numbers = {
        world.name: {
            "seeds": list(world.seeds),
            "num_prompts": world.num_prompts,
            "methods": study_table.numbers(world.series, (BASELINE, RIVAL)),
            "curves": curve_numbers(world.trainings),
            "trials": world.trials,
        }
        for world in worlds
    }
    write_json(target / NUMBERS, {"command": _command(config), "worlds": numbers})
    page = target / PAGE
    draw_differences(worlds, BASELINE, target / PICTURE)
    parts = [
        "# Objectives and methods compared over seeds",
        f"Made by `{_command(config)}`, which writes this page, its picture and `{NUMBERS}` from "
        "the run folders.",
        f"![Gold of each method minus that of RRHF offline, with 95 % intervals]({PICTURE})",
        *(part for world in worlds for part in world_part(world, BASELINE, RIVAL)),
    ]
    _write_page(page, parts)
    if config.axis_seeds:
        _write_axes(config, target, say)
    return page


def _write_axes(config: StudyConfig, target: Path, say: Callable[[str], None]) -> None:
    """Run the missing branches of the axes, then write their page and numbers."""
    seeds = range(config.first_seed, config.first_seed + config.axis_seeds)
    parts = [
        "# One thing varied at a time",
        f"Made by `{_command(config)}`. Seeds {seeds[0]} to {seeds[-1]} of the study "
        f"([{PAGE}]({PAGE})), with the settings chosen there: one thing changes, the rest stays. "
        "Gold; mean [95 % interval over seeds and prompts].",
    ]
    numbers: dict[str, Any] = {}
    for world in config.worlds:
        folder = _world_folder(config, world)
        settings = chosen_settings(folder / "tuning", _methods(config))
        found = run_axes(folder, world, config.size, settings, seeds, jobs=config.jobs, say=say)
        parts.append(f"## {world}")
        numbers[world] = {}
        for name, axis in AXES.items():
            series = {
                value: {
                    key: Series(METHODS[key].title, rows, TrainingCost())
                    for key, rows in of_value.items()
                }
                for value, of_value in found[name].items()
            }
            parts += [f"### {axis.title[0].upper()}{axis.title[1:]}", axis_table(series)]
            numbers[world][name] = axis_numbers(series)
    write_json(target / AXES_NUMBERS, {"command": _command(config), "worlds": numbers})
    _write_page(target / AXES_PAGE, parts)


def _write_page(page: Path, parts: Sequence[str]) -> None:
    with replaced_file(page) as file:
        file.write(("\n\n".join(part.rstrip() for part in parts) + "\n").encode())


def _command(config: StudyConfig) -> str:
    defaults = StudyConfig()
    words = ["rrhf study"]
    for name in ("worlds", "seeds", "first_seed", "methods", "long_seeds", "axis_seeds", "size"):
        value = getattr(config, name)
        if value != getattr(defaults, name):
            given = " ".join(value) if isinstance(value, list) else value
            words.append(f"--{name} {given}")
    return " ".join([*words, "--output_dir RUNS"])


def _world_results(config: StudyConfig, world: str, say: Callable[[str], None]) -> WorldResults:
    folder, methods = _world_folder(config, world), _methods(config)
    settings = tuned(folder / "tuning", world, config.size, methods, config.jobs, say)
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    long = seeds[: config.long_seeds]
    by_seed = {
        seed: [m for m in methods if seed in long or not METHODS[m].is_long] for seed in seeds
    }
    run_one = partial(_run_seed, folder, world, config.size, by_seed, settings)
    results: list[SeedResult] = run_seeds(run_one, seeds, config.jobs, say)
    series = {
        key: Series(
            METHODS[key].title,
            [result.rows.get(key) for result in results],
            mean_cost([result.costs[key] for result in results if key in result.costs]),
        )
        for key in methods
        if any(key in result.rows for result in results)
    }
    num_prompts = results[0].rows["sft"]["made_with"]["num_prompts"]
    trials = json.loads((folder / "tuning" / LOG).read_text())["trials"]
    return WorldResults(
        world, seeds, num_prompts, series, trainings(results, methods, RIVAL), trials
    )


def _world_folder(config: StudyConfig, world: str) -> Path:
    return Path(config.output_dir) / world.replace(":", ".")


def _methods(config: StudyConfig) -> list[str]:
    return [m for m in METHODS if m in ALWAYS or m in (config.methods or METHODS)]


def _run_seed(
    folder: Path,
    world: str,
    size: str,
    methods: Mapping[int, Sequence[str]],
    settings: Settings,
    seed: int,
    say: Callable[[str], None],
) -> SeedResult:
    place = seed_folder(folder, seed)
    return BriefStudy(methods[seed], place, world, size, seed, say, settings=settings).run()
