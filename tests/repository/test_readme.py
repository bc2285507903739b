"""The README's commands, one a stage, run in their order to what they make."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from places import ROOT
from tiny import save_tiny

from docs import gold_by_method
from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets

README = ROOT / "README.md"
SMALLER = {
    "train": ["--max_steps", "2", "--model_max_length", "100"],
    "train ppo": ["--max_steps", "2", "--model_max_length", "100", "--max_new_tokens", "6"],
    "train iterative": ["--max_new_tokens", "6", "--model_max_length", "100", "--num_prompts", "4"],
    "generate": ["--max_new_tokens", "6"],
    "evaluate": ["--max_new_tokens", "6", "--bootstrap_resamples", "20"],
}

torch.set_num_threads(1)


def stage_commands() -> list[list[str]]:
    """The commands of the table, in order; fetching needs a network and has a test of its own."""
    rows = re.findall(r"^\| [^|]+ \| (`rrhf .+`) \|$", README.read_text(), re.MULTILINE)
    spans = [span for row in rows for span in re.findall(r"`(rrhf [^`]+)`", row)]
    return [words for span in spans if (words := shlex.split(span)[1:])[0] != "fetch"]


def test_every_stage_has_its_command() -> None:
    begun = [" ".join(words[:2]) for words in stage_commands()]
    for stage in ("data convert", "train sft", "train reward", "train rank"):
        assert stage in begun
    assert {words[0] for words in stage_commands()} >= {"generate", "score", "evaluate", "compare"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    save_tiny(folder / "MODEL")
    with (folder / "PAIRS.jsonl").open("w") as file:
        for number in range(24):
            start = f"\n\nHuman: What is {number} and a half?\n\nAssistant:"
            pair = {"chosen": f"{start} A number.", "rejected": f"{start} No idea, sorry."}
            file.write(json.dumps(pair) + "\n")
    return folder


def test_the_stages_in_their_order(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names = {
        "MODEL": "MODEL",
        "PAIRS": "PAIRS.jsonl",
        "PROMPTS": "PAIRS.jsonl",
        "HELDOUT": "PAIRS.jsonl",
        "REWARD_MODEL": "train-reward/reward_model",
        "IN": "generated.jsonl",
        "SCORED": "scored.jsonl",
        "ROWS": "rows",
        "RUN/policy": "train-rank/policy",
    }
    for words in stage_commands():
        stage = "-".join(word for word in words[:2] if not word.startswith("--"))
        outs = {"generate": "generated.jsonl", "score": "scored.jsonl"}
        here = {**names, "RUN": stage, "OUT": outs.get(words[0], "parts")}
        smaller = SMALLER.get(" ".join(words[:2])) or SMALLER.get(words[0], [])
        command = [here.get(word, word) for word in words] + smaller
        assert main(command) == 0, command
    for made in (
        "iterative/policy",
        "sft/policy",
        "rank/policy",
        "ppo/policy",
        "ppo/value",
        "reward/reward_model",
    ):
        assert (place / f"train-{made}" / "model.safetensors").is_file()
    for stage in ("sft", "reward", "rank", "iterative", "ppo"):
        settings = ["--config", f"train-{stage}/settings.json"]
        assert main(["train", stage, *settings]) == 2  # the folder holds that run
        assert main(["train", stage, *settings, "--output_dir", f"again-{stage}"]) == 0
        model = "reward_model" if stage == "reward" else "policy"
        first, second = (place / f"{run}-{stage}" / model for run in ("train", "again"))
        weights = "model.safetensors"
        assert (first / weights).read_bytes() == (second / weights).read_bytes(), stage
    scored = list(read_candidate_sets(place / "scored.jsonl"))
    assert len(scored) == 24 and all(None not in s.scores for s in scored)
    assert "| reward" in (place / "table.md").read_text()
    assert {path.name for path in (place / "parts").glob("*.jsonl")} == {
        "reward.jsonl",
        "policy.jsonl",
        "heldout.jsonl",
    }


def test_the_lines_of_the_first_screen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach what they say, with a tiny model and without the time for training."""
    found = re.search(r"```\n(echo .*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    scorer, *commands = found[1].splitlines()
    assert len(commands) == 4
    folder = place / "first_screen"
    folder.mkdir()
    monkeypatch.chdir(folder)
    subprocess.run(["bash", "-c", scorer], check=True)
    names = {"MODEL": "../MODEL", "PAIRS": "../PAIRS.jsonl"}
    smaller = {
        "response-gen": ["--max_new_tokens", "6"],
        "train": SMALLER["train"],
        "evaluate": SMALLER["evaluate"],
    }
    for line in commands:
        words = [names.get(word, word) for word in shlex.split(line)[1:]]
        assert main([*words, *smaller.get(words[0], [])]) == 0, line
    assert all((folder / "rows" / f"{row}.json").is_file() for row in ("MODEL", "run_greedy"))
    scored = list(read_candidate_sets(folder / "candidates/train_data.json"))
    assert all(c.score == -len(c.response.split()) for s in scored for c in s.candidates)


def test_the_picture_is_drawn_from_the_study() -> None:
    rows = json.loads(gold_by_method.SOURCE.read_text())["rows"]
    drawn = gold_by_method.picture(rows)
    remake = "run `python docs/gold_by_method.py`"
    assert gold_by_method.PICTURE.read_text() == drawn, remake
    rows["ppo"]["metrics"]["gold"]["mean"] += 0.01
    assert gold_by_method.picture(rows) != drawn
    assert f"]({gold_by_method.PICTURE.relative_to(README.parent)})" in README.read_text()


def test_the_pictures_and_pages_that_it_names_are_there() -> None:
    text = README.read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert "docs/coming_from.md" in links
    missing = [link for link in links if not (README.parent / link).exists()]
    assert not missing
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    assert "@" not in text.replace("@Human", ""), "a placeholder was left in the README"
