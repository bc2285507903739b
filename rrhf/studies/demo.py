"""The demonstration: a small language model becomes measurably better by RRHF, in minutes.

Nothing is downloaded: data, gold preference and model come from the built-in help desk. Seeds run
one after the other, or in parallel on several cores, and are reported together. The intervals are
over the prompts of all seeds, so they do not show the variation between seeds; `table.md` also
gives gold by seed.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rrhf.files import make_folder, replaced_file
from rrhf.report.methods_page import by_seed_table
from rrhf.report.pooling import pooled_rows
from rrhf.report.table import format_number, markdown_lines, markdown_table, terminal_table
from rrhf.studies.config import DemoConfig
from rrhf.studies.demo_study import DemoStudy
from rrhf.studies.rows import Row
from rrhf.studies.seeds import run_seeds, seed_folder
from rrhf.worlds import DEFAULT

logger = logging.getLogger(__name__)

SCREEN_COLUMNS = ("gold", "win_gold", "reward", "kl", "ppl_reference", "length")
FILE_COLUMNS = (
    *SCREEN_COLUMNS[:3],
    "win_reward",
    "tie_gold",
    "pi_accuracy",
    "kl",
    "ppl_reference",
    "ppl_human",
    "length",
    "distinct_2",
    "without_eos",
    "part_myth",
    "part_off",
    "part_rude",
    "part_garbled",
)


def run_demo(config: DemoConfig, say: Callable[[str], None] = logger.info) -> Path:
    """Run every seed and write the table; return its path."""
    started = time.monotonic()
    folder = Path(config.output_dir)
    make_folder(folder)
    run = partial(_run_seed, folder, config.size)
    by_seed = run_seeds(run, range(config.seeds), config.jobs, say)
    rows = pooled_rows(by_seed)
    table = folder / "table.md"
    with replaced_file(table) as file:
        file.write(_as_page(config, by_seed, rows).encode())
    say("\n" + terminal_table(rows, SCREEN_COLUMNS))
    say(_closing_words(folder, config, rows, time.monotonic() - started))
    return table


def _run_seed(folder: Path, size: str, seed: int, say: Callable[[str], None]) -> list[Row]:
    return DemoStudy(seed_folder(folder, seed), DEFAULT, size, seed, say).run()


def _as_page(config: DemoConfig, by_seed: Sequence[Sequence[Row]], rows: Sequence[Row]) -> str:
    num_prompts = rows[0]["made_with"]["num_prompts"]
    lines = [
        "# RRHF on the Tiny Help Desk\n",
        f"`rrhf demo --seeds {config.seeds} --size {config.size}`: {num_prompts} held-out prompts "
        f"a seed, {config.seeds} seed(s); mean [95 % bootstrap interval over prompts]. gold is the "
        "world's true preference, reward what the reward model learnt of it, win against "
        "independent samples of SFT (ties count half), KL in nats a response to SFT.\n",
        markdown_table(rows, FILE_COLUMNS),
    ]
    if len(by_seed) > 1:
        table = by_seed_table(range(len(by_seed)), list(zip(*by_seed, strict=True)))
        lines += ["\nGold by seed:\n", table]
    lines += ["\nSeconds after SFT and reward model, candidates included:\n", _costs(by_seed)]
    return "\n".join(lines)


def _costs(by_seed: Sequence[Sequence[Row]]) -> str:
    lines = []
    for rows in zip(*by_seed, strict=True):
        seconds = statistics.mean(sum(row["training"].values()) for row in rows)
        lines.append([rows[0]["name"], format_number(seconds, 0)])
    return markdown_lines(["", "seconds"], lines)


def _closing_words(folder: Path, config: DemoConfig, rows: Sequence[Row], seconds: float) -> str:
    first = seed_folder(folder, 0)
    gold = {row["name"]: row["metrics"]["gold"]["mean"] for row in rows}
    return "\n".join(
        [
            f"Gold {gold['SFT']:.2f} (SFT) -> {gold['RRHF']:.2f} (RRHF) -> "
            f"{gold['RRHF round 2']:.2f} (round 2), {gold['PPO']:.2f} (PPO), on prompts that no "
            f"training saw, in {seconds:.0f} s.",
            "",
            f"policy   {first / 'rrhf-2' / 'policy'}",
            f"samples  {first / 'evaluation'}/*.samples.jsonl",
            f"table    {folder / 'table.md'}",
            f"data     {first / 'round-1' / 'train_data.json'}",
            "",
            "Next, on a model and data of your own:",
            "  bash data_generation/response_gen.sh MODEL OUT_DIR --prompts FILE --scorer MODEL",
            "  bash train.sh MODEL OUT OUT_DIR/train_data.json",
        ]
    )
