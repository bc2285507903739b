"""Compares the gains and costs of all methods on one world, with the same number of responses.

For each seed, all methods start from the same SFT policy and reward model: best-of-N, fine-tuning
on the best of N, RRHF offline, in rounds (IP) and online (OP), PPO, RLOO and GRPO. Methods with one
round and online methods draw and score the same number of responses. The page, its two pictures and
their numbers are made only from the run folders, so a second call writes them again without
training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.files import make_folder, replaced_file, write_json
from rrhf.report.method_figures import GOLD_AGAINST_REWARD, REWARD_AGAINST_KL, draw
from rrhf.report.methods_page import (
    COLUMNS,
    by_seed_table,
    cost_table,
    gains_table,
    gold_claims,
)
from rrhf.report.over_optimization import find_divergence, kl_of, sentence
from rrhf.report.pooling import pooled_rows
from rrhf.report.training_cost import TrainingCost, mean_cost
from rrhf.studies.config import MethodsConfig
from rrhf.studies.method_table import COMPARED, METHODS
from rrhf.studies.methods_study import MethodsStudy, SeedResult
from rrhf.studies.seeds import run_seeds, seed_folder
from rrhf.worlds import make_world

logger = logging.getLogger(__name__)

KEPT = (*COLUMNS, "kl_bound", "part_myth", "part_off", "part_rude", "part_garbled")
ON_CURVES = ("reward", "gold", "kl", "kl_bound")
PAGE, NUMBERS = "methods.md", "methods.json"
REWARD_KL, GOLD_REWARD = "methods_reward_kl.png", "methods_gold_reward.png"


@dataclass(frozen=True)
class About:
    """How a page was made.

    Attributes:
        command: the command that made it.
        world: the name of the world.
        choice: how the settings were chosen; "" = not stated.
    """

    command: str
    world: str = "the world help_desk"
    choice: str = ""


def run(config: MethodsConfig, say: Callable[[str], None] = logger.info) -> Path:
    """Run every seed, then write the page; return its path."""
    started = time.monotonic()
    folder = Path(config.output_dir)
    make_folder(folder)
    methods = ["sft", *(config.methods or COMPARED)]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    run_seed = partial(_run_seed, folder, config.world, config.size, methods)
    by_seed = run_seeds(run_seed, seeds, config.jobs, say)
    page = write_report(by_seed, seeds, Path(config.into or folder), _about(config))
    say(f"{page} is written, after {time.monotonic() - started:.0f} s")
    return page


def _run_seed(
    folder: Path,
    world: str,
    size: str,
    methods: Sequence[str],
    seed: int,
    say: Callable[[str], None],
) -> SeedResult:
    return MethodsStudy(methods, seed_folder(folder, seed), world, size, seed, say).run()


def write_report(
    by_seed: Sequence[SeedResult], seeds: Sequence[int], target: Path, about: About
) -> Path:
    """Write page, pictures and numbers from the results of the seeds; return the page's path.

    Args:
        by_seed: the result of every seed, with the same methods.
        seeds: the numbers of the seeds.
        target: the folder to write to.
        about: how the results were made.
    """
    target.mkdir(parents=True, exist_ok=True)
    rows = _pooled([result.rows for result in by_seed])
    greedy = _pooled([result.greedy for result in by_seed])
    costs = {key: mean_cost([result.costs[key] for result in by_seed]) for key in rows}
    titles = list(by_seed[0].curves)
    curves = {
        title: pooled_rows([result.curves[title] for result in by_seed], ON_CURVES)
        for title in titles
    }
    divergences = {title: find_divergence(points) for title, points in curves.items()}
    if curves:
        untrained = {m.curve for m in METHODS.values() if m.best_of > 1}
        draw(curves, REWARD_AGAINST_KL, target / REWARD_KL, untrained)
        draw(curves, GOLD_AGAINST_REWARD, target / GOLD_REWARD, untrained)
    write_json(
        target / NUMBERS,
        {
            "command": about.command,
            "seeds": list(seeds),
            "rows": {
                key: {
                    "name": row["name"],
                    "metrics": row["metrics"],
                    "greedy": greedy[key]["metrics"] if key in greedy else None,
                    "gold_by_seed": [r.rows[key]["metrics"]["gold"]["mean"] for r in by_seed],
                    "cost": costs[key].as_dict(),
                }
                for key, row in rows.items()
            },
            "curves": {
                title: [
                    {
                        "name": row["name"],
                        "kl": kl_of(row),
                        **{metric: row["metrics"][metric] for metric in ("reward", "gold")},
                    }
                    for row in points
                ]
                for title, points in curves.items()
            },
            "over_optimization": {title: found.as_dict() for title, found in divergences.items()},
        },
    )
    sentences = [sentence(title, found) for title, found in divergences.items()]
    page = target / PAGE
    with replaced_file(page) as file:
        file.write(_page(by_seed, seeds, about, rows, greedy, costs, sentences).encode())
    return page


def _pooled(by_seed: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    keys = list(by_seed[0])
    return dict(
        zip(keys, pooled_rows([[rows[key] for key in keys] for rows in by_seed], KEPT), strict=True)
    )


def _page(
    by_seed: Sequence[SeedResult],
    seeds: Sequence[int],
    about: About,
    rows: Mapping[str, dict[str, Any]],
    greedy: Mapping[str, dict[str, Any]],
    costs: Mapping[str, TrainingCost],
    sentences: Sequence[str],
) -> str:
    num_prompts = by_seed[0].rows["sft"]["made_with"]["num_prompts"]
    titles = {key: str(row["name"]) for key, row in rows.items()}
    by_row = [[result.rows[key] for result in by_seed] for key in rows]
    parts = [
        f"# Methods compared on {about.world}",
        f"Made by `{about.command}`, which writes this page, its pictures and `{NUMBERS}` from the "
        "run folders.",
        _setting(seeds, num_prompts),
        "## What each gained",
        gains_table(rows, greedy).rstrip(),
        gold_claims(by_row).rstrip(),
    ]
    if len(seeds) > 1:
        parts += ["Gold by seed (sampled):", by_seed_table(seeds, by_row).rstrip()]
    per_answer = {key: METHODS[key].best_of for key in rows}
    parts += [
        "## What each cost",
        cost_table(titles, costs, per_answer).rstrip(),
        _COSTS,
        *filter(None, [about.choice]),
    ]
    if sentences:
        parts += [
            "## Reward against KL",
            f"![Reward-model score against KL from SFT, one curve a method]({REWARD_KL})",
            "## Where gold stops following the reward model",
            f"![Gold against reward-model score, one curve a method]({GOLD_REWARD})",
            "\n".join(f"- {text}" for text in sentences),
            _CURVES,
        ]
    return "\n\n".join(parts) + "\n"


def _setting(seeds: Sequence[int], num_prompts: int) -> str:
    numbers = ", ".join(str(seed) for seed in seeds)
    return (
        f"Seeds {numbers}: other data, tokenizer, SFT policy and reward model each; the methods of "
        f"one seed share them. {num_prompts} held-out prompts a seed, two samples each at "
        "temperature 1, and one greedy response. Mean [95 % bootstrap interval over the prompts of "
        "all seeds]; gold is the world's true preference, reward what the reward model learnt of "
        "it (in its own normalised unit), win against independent samples of SFT, ties counting "
        "half, KL in nats a response to SFT, ppl_reference the perplexity of a method's own "
        "responses under SFT. The intervals of the table are over prompts alone; those of the "
        "sentences below it are of differences paired by seed and prompt, over other seeds and "
        "prompts, and what they say holds after Holm's correction for their number."
    )


_COSTS = (
    "After SFT and reward model, mean of the seeds; evaluation is not counted. A round of offline "
    "ranking and each online method draw and score equally many responses, and make two passes "
    "over them (a later round: one). Best-of-N trains nothing and pays at every answer: N "
    "responses and N scores. Tokens trained on went forward and backward, once for each network "
    "that learns (a critic's count as well). Networks in memory: policy; online, reference and "
    "reward model as well; PPO, a critic too. CPU seconds are of one thread, saving included."
)

_CURVES = (
    "Points of a curve: SFT, the policies kept on the way (one sample a prompt), and what the "
    "method ends with; of RRHF in rounds, each round; of best-of-N, N = 1, 2, 4, 8, 16, with the "
    "bound log N - (N - 1)/N for its KL. Gold is said to part from the reward model only where "
    "paired 95 % intervals say so: while the reward rises gold falls, or gains less for each unit "
    "of it than up to that point."
)


def _about(config: MethodsConfig) -> About:
    words = f"rrhf compare --world {config.world} --seeds {config.seeds}"
    if config.first_seed:
        words += f" --first_seed {config.first_seed}"
    if config.methods:
        words += f" --methods {' '.join(config.methods)}"
    if config.size != "full":
        words += f" --size {config.size}"
    recipe = make_world(config.world, size=config.size, seed=config.first_seed).recipe()
    return About(f"{words} --output_dir RUNS", f"the world {config.world}", recipe.choice)
