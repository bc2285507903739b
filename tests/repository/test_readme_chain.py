"""The README's commands, as they stand there, on real prompts at defaults: no step stops the chain.

The reward model's window is shorter than some prompts with their responses: those are left out and
counted. Only the number of rows is ours.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from places import ROOT

from rrhf.cli.main import main
from rrhf.manifests import read_manifest

torch.set_num_threads(1)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

README = ROOT / "README.md"
# Pairs of the file, and a few whose prompts or replies exceed 512 tokens.
NUM_PAIRS, NUM_LONG = 60, 6


def commands_of_the_readme() -> list[str]:
    """What the table of stages shows, in its order."""
    rows = [line for line in README.read_text().splitlines() if line.startswith("| ")]
    return [command for row in rows for command in re.findall(r"`(rrhf [^`]+)`", row)]


def write_pairs(source: Path, target: Path) -> None:
    """The first pairs of a file, and those with the longest replies, packed as HH comes."""
    with gzip.open(source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    by_length = sorted(rows[NUM_PAIRS:], key=lambda row: -len(row["chosen"].split()))
    with gzip.open(target, "wt", encoding="utf-8") as file:
        file.writelines(
            json.dumps(row) + "\n" for row in [*rows[:NUM_PAIRS], *by_length[:NUM_LONG]]
        )


def test_the_chain_of_the_readme_runs_on_real_prompts_at_defaults(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(shared_data / "hh_harmless_base_test.jsonl.gz", tmp_path / "pairs.jsonl.gz")
    model = str(shared_data / "stories260K")
    # What a reader puts in place of the capitals, command by command.
    places: dict[str, dict[str, str]] = {
        "data stats": {"PAIRS": "pairs.jsonl.gz"},
        "data convert": {"PAIRS": "pairs.jsonl.gz", "OUT": "parts"},
        "train sft": {"MODEL": model, "PAIRS": "pairs.jsonl.gz", "RUN": "sft"},
        "train reward": {"MODEL": model, "PAIRS": "parts/reward.jsonl", "RUN": "reward"},
        "generate": {"MODEL": "sft", "PROMPTS": "parts/policy.jsonl", "OUT": "candidates.jsonl"},
        "score": {"IN": "candidates.jsonl", "OUT": "scored.jsonl", "REWARD_MODEL": "reward"},
        "train rank": {"MODEL": "sft", "SCORED": "scored.jsonl", "RUN": "rank"},
        "train iterative": {"RUN": "iterative"},
        "train ppo": {"RUN": "ppo"},
        "evaluate": {"RUN": "rank", "HELDOUT": "parts/heldout.jsonl", "ROWS": "rows"},
        "compare": {"ROWS": "rows"},
    }
    usual = {"MODEL": "sft", "REWARD_MODEL": "reward", "PROMPTS": "parts/policy.jsonl"}
    ran = []
    for command in commands_of_the_readme():
        words = shlex.split(command)[1:]
        name = " ".join(words[:2]) if words[0] in ("data", "train") else words[0]
        if name not in places:
            assert name == "fetch", f"the README shows {command}, which is not tried here"
            continue
        chosen = {**usual, **places[name]}
        capitals = r"(?<![\w-])({})(?![\w-])".format("|".join(chosen))
        filled = [re.sub(capitals, lambda m, c=chosen: c[m.group()], word) for word in words]
        assert main(filled) == 0, f"rrhf {shlex.join(filled)}"
        ran.append(name)
    assert set(ran) == set(places)

    scored = read_manifest("scored.jsonl") or {}
    # More than the 1 % at which the scorer's failures would stop the stage.
    assert scored["too_long_to_score"] > 0.01 * scored["candidates"]
    assert scored["too_long_to_score"] == scored["unscored"]
    ranked = (read_manifest("rank") or {})["data"]
    assert ranked["candidates_without_score"] == scored["unscored"]
    assert ranked["candidates_used"] == scored["scored_candidates"]
    assert Path("iterative/policy/model.safetensors").exists()
    assert Path("ppo/policy/model.safetensors").exists()
    assert "| sft" in Path("table.md").read_text()
