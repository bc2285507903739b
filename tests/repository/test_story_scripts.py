"""The scripts with everything real behind them: prompts in, an RRHF-trained policy out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

SCORER = """
def score(prompts, responses, messages):
    return [-abs(len(response) - 40.0) for response in responses]
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with an awkward name, a tiny policy, a scorer and HH pairs."""
    from tiny import save_tiny

    place = tmp_path / "my work; rm x"
    place.mkdir()
    save_tiny(place / "a policy")
    (place / "by_length.py").write_text(SCORER)
    with (place / "pairs; hh.jsonl").open("w") as file:
        for number in range(6):
            start = f"\n\nHuman: What is {number} and a half?\n\nAssistant:"
            pair = {"chosen": f"{start} A number.", "rejected": f"{start} No idea at all, sorry."}
            file.write(json.dumps(pair) + "\n")
    return place


def run(workplace: Path, script: str, *words: str) -> str:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", str(ROOT / script), *words],
        cwd=workplace,
        env=environment,
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_responses_are_made_and_scored_and_a_policy_is_trained_on_them(workplace: Path):
    prompts = ["--prompts", "pairs; hh.jsonl", "--max_new_tokens", "6"]
    scorer = ["--scorer", "function:by_length:score"]
    made = run(workplace, "data_generation/response_gen.sh", "a policy", "out 1", *prompts, *scorer)
    told = made.splitlines()[-1]
    assert told.startswith("Ranked candidates: out 1/train_data.json; `rrhf train rank ")
    assert "--data_path 'out 1/train_data.json'" in told
    rows = [json.loads(line) for line in (workplace / "out 1/train_data.json").open()]
    assert len(rows) == 6
    for row in rows:
        assert list(row)[:3] == ["query", "responses", "scores"]
        assert len(row["responses"]) == len(row["scores"]) == 6  # four samples, chosen, rejected
        assert row["scores"] == [-abs(len(text) - 40.0) for text in row["responses"]]
        assert row["sources"][-2:] == ["human:chosen", "human:rejected"]
    sampling = json.loads((workplace / "out 1/generated.manifest.json").read_text())["settings"][
        "sampling"
    ]
    assert (sampling["num_beam_groups"], sampling["diversity_penalty"]) == (4, 1.0)

    again = ["out 1/generated.jsonl", "scored again.jsonl", *scorer]
    run(workplace, "data_generation/scoring_responses.sh", *again)
    assert (workplace / "scored again.jsonl").read_bytes() == (
        workplace / "out 1/train_data.json"
    ).read_bytes()

    training = ["--config", "tiny", "--max_steps", "2", "--per_device_train_batch_size", "3"]
    training += ["--learning_rate=1e-3", "--model_max_length", "128"]
    data = "out 1/train_data.json"
    told = run(workplace, "train.sh", "a policy", "run; one", data, *training)
    assert told == "Trained model: run; one/policy\n"
    config = json.loads((workplace / "run; one/settings.json").read_text())
    assert config["learning_rate"] == 1e-3
    assert (workplace / "run; one/policy/model.safetensors").is_file()
    before = (workplace / "a policy/model.safetensors").read_bytes()
    assert (workplace / "run; one/policy/model.safetensors").read_bytes() != before


def test_two_processes_train_the_same_policy_as_one(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script starts the two; the one is the command that it would start."""
    from safetensors.torch import load_file

    from rrhf.cli.main import main

    monkeypatch.chdir(workplace)

    with (workplace / "data.json").open("w") as file:
        for number in range(4):
            texts = ["I am sorry.", f"You could ask {number} friends.", "No."]
            file.write(json.dumps({"query": f"{number}?", "responses": texts, "scores": [2, 3, 1]}))
            file.write("\n")
    steps = ["--max_steps", "2", "--model_max_length", "128"]
    one = ["--model_name_or_path", "a policy", "--output_dir", "one", "--data_path", "data.json"]
    one += [*steps, "--per_device_train_batch_size", "2"]
    two = ["a policy", "two", "data.json", *steps, "--per_device_train_batch_size", "1"]
    assert main(["train", "rank", *one]) == 0
    run(workplace, "train.sh", *two, "--launch", "ddp")
    weights = [load_file(workplace / name / "policy/model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        # Adam divides by the gradient's own size, so rounding of a gradient near 0 shows in full;
        # two steps of 2e-5 bound it at 4e-5, and most weights agree to rounding.
        assert (weight - weights[1][name]).abs().max() <= 4e-5
        assert (weight - weights[1][name]).abs().median() < 1e-7
