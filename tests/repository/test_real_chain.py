"""The whole chain on real input and a real, if tiny, pretrained LLaMA, in seconds.

The same commands as `paper/real_run.sh`: split by first human turn, reward model, candidates, RRHF,
evaluation, table.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from real_run_report import shorter_reply_accuracy, weights_moved, write_report

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.views import first_turn
from rrhf.evaluation.results import load_row
from rrhf.manifests import read_manifest
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, Candidate, CandidateSet

torch.set_num_threads(1)
pytestmark = pytest.mark.timeout(600)


def do(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def chain(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chain")
    model = shared_data / "stories260K"
    pairs = shared_data / "hh_harmless_base_test.jsonl.gz"
    shares = "{reward: 0.6, policy: 0.15, heldout: 0.25}"
    do("data", "convert", pairs, out / "data", "--parts", shares)
    short = ["--model_max_length", 256, "--save_steps", 0]
    do(
        *["train", "reward", "--model_name_or_path", model, "--output_dir", out / "reward"],
        *["--data_path", f"{out}/data/reward.jsonl:96/-1", "--max_response_tokens", 120],
        *["--validation_datasets", f"{out}/data/heldout.jsonl:48/-1", "--learning_rate", 1e-3],
        *["--per_device_train_batch_size", 8, "--long_responses", "cut", *short],
    )
    do(
        *["response-gen", model, out / "candidates", "--prompts", out / "data" / "policy.jsonl"],
        *["--num_prompts", 8, "--do_sample", "true", "--max_new_tokens", 24],
        *["--scorer", out / "reward" / "reward_model"],
    )
    do(
        *["train", "rank", "--model_name_or_path", model, "--output_dir", out / "rrhf"],
        *["--data_path", out / "candidates" / "train_data.json", "--learning_rate", 1e-4],
        *["--per_device_train_batch_size", 2, "--num_train_epochs", 2, *short],
    )
    online = ["--reward_model_name_or_path", out / "reward" / "reward_model"]
    online += ["--train_datasets", out / "candidates" / "train_data.json", "--max_new_tokens", 24]
    online += ["--num_return_sequences", 2, "--rollout_size", 16, "--num_rollouts", 2]
    online += ["--learning_rate", 1e-3, *short]
    for folder, kind in (
        ("online_rrhf", ["--method", "rrhf", "--per_device_train_batch_size", 4]),
        ("ppo_lora", ["--use_lora", "--share_trunk", "--per_device_train_batch_size", 8]),
    ):
        run = ["--model_name_or_path", model, "--output_dir", out / folder]
        do("train", "ppo", *run, *online, *kind)
    shared = ["--prompts", out / "data" / "heldout.jsonl", "--num_prompts", 8]
    shared += ["--scorer", out / "reward" / "reward_model", "--output_dir", out / "rows"]
    shared += ["--max_new_tokens", 24]
    shared += ["--reference_model_name_or_path", model]
    shared += ["--baseline", model]
    do("evaluate", "--model_name_or_path", model, "--name", "base", *shared)
    do("evaluate", "--model_name_or_path", out / "rrhf" / "policy", "--name", "RRHF", *shared)
    best = ["--best_of_n", 4, "--decoding", "sample"]
    name = "base best of 4"
    do("evaluate", "--model_name_or_path", model, "--name", name, *best, *shared)
    for source in ("chosen", "rejected"):
        given = ["--responses", "dataset", "--response_source", f"human:{source}"]
        do("evaluate", *given, "--name", f"data: {source}", *shared)
    do("evaluate", "--model_name_or_path", model, "--name", "opponent", "--seed", 7, *shared)
    trained = {"RRHF": "rrhf", "online RRHF": "online_rrhf", "PPO LoRA": "ppo_lora"}
    for name in ("online RRHF", "PPO LoRA"):
        policy = out / trained[name] / "policy"
        do("evaluate", "--model_name_or_path", policy, "--name", name, *shared)
    policies = {name: out / folder / "policy" for name, folder in trained.items()}
    for name, policy in {"base": model, **policies}.items():
        several = ["--decoding", "sample", "--samples_per_prompt", 4]
        name = f"{name}, 4 samples"
        do("evaluate", "--model_name_or_path", policy, "--name", name, *several, *shared)
    rows = [out / "rows" / f"{name}.json" for name in ("base", "RRHF")]
    do("compare", *rows, "--output", out / "table.md")
    return out


def test_the_parts_share_no_first_turn(chain: Path) -> None:
    turns = [
        {first_turn(s) for s in read_candidate_sets(chain / "data" / f"{part}.jsonl")}
        for part in ("reward", "policy", "heldout")
    ]
    assert all(len(part) > 200 for part in turns)
    assert not turns[0] & turns[1] and not turns[0] & turns[2] and not turns[1] & turns[2]


def test_the_reward_model_reports_its_held_out_accuracy(chain: Path) -> None:
    told = (read_manifest(chain / "reward") or {})["evaluation"]
    assert 0 <= told["accuracy_low"] <= told["accuracy"] <= told["accuracy_high"] <= 1
    assert told["pairs"] >= 40


def test_candidates_are_four_samples_and_the_two_of_the_data(chain: Path) -> None:
    rows = [json.loads(line) for line in (chain / "candidates" / "train_data.json").open()]
    assert len(rows) == 8
    for row in rows:
        assert len(row["responses"]) == len(row["scores"]) == 6
        assert row["sources"][-2:] == ["human:chosen", "human:rejected"]
        assert row["query"].startswith("\n\nHuman:") and row["messages"][-1]["role"] == "user"
        assert len(set(row["scores"])) > 1


def test_rrhf_moved_every_kind_of_weight(chain: Path, shared_data: Path) -> None:
    moved, largest = weights_moved(
        shared_data / "stories260K" / "model.safetensors",
        chain / "rrhf" / "policy" / "model.safetensors",
    )
    assert 1e-5 < moved < 0.2 and largest[1] >= moved
    rows = [json.loads(line) for line in (chain / "rrhf" / "metrics.jsonl").open()]
    assert len(rows) == 8 and all(row["rank_loss"] >= 0 for row in rows)


def test_the_table_compares_base_and_rrhf(chain: Path) -> None:
    base, rrhf = (load_row(chain / "rows" / f"{name}.json") for name in ("base", "RRHF"))
    assert abs(base["metrics"]["kl"]["mean"]) < 1e-3
    assert rrhf["metrics"]["kl"]["mean"] != base["metrics"]["kl"]["mean"]
    page = (chain / "table.md").read_text()
    assert "| base |" in page and "| RRHF |" in page and "reward" in page


def test_the_report_is_made_of_what_the_steps_left(chain: Path, shared_data: Path) -> None:
    steps = chain / "steps"
    steps.mkdir()
    model = shared_data / "stories260K"
    command = f"rrhf train reward --model_name_or_path {model} --output_dir {chain}/reward "
    (steps / "2-reward.command").write_text(command)
    for step in ("2-reward", "3-candidates", "12-online-rrhf", "13-ppo-lora"):
        (steps / f"{step}.seconds").write_text("12\n")
        (steps / f"{step}.command").touch(exist_ok=True)
    page = write_report(chain).read_text()
    assert "| 2-reward | 12 | `rrhf train reward --model_name_or_path MODEL" in page
    assert str(chain) not in page and str(model) not in page
    told = (read_manifest(chain / "reward") or {})["evaluation"]
    assert f"{told['accuracy']:.3f} [" in page and "the shorter reply is chosen" in page
    for name in ("data: chosen", "base best of 4", "RRHF greedy", "RRHF, 4 samples"):
        assert f"| {name} |" in page
    assert (chain / "real_run_curves.png").stat().st_size > 10_000
    told = json.loads((chain / "rows" / "PPO_LoRA_4_samples.json").read_text())["metrics"]["reward"]
    assert f"| PPO, LoRA | {told['mean']:.2f} [" in page and "| RRHF online |" in page
    assert "| 32 | " in page and "2 (policy, reward model)" in page
    assert page.count("offline RRHF's (") == 2 and "PPO, all weights" not in page
    assert (chain / "real_run_online.png").stat().st_size > 10_000


def test_the_shorter_reply_and_its_interval() -> None:
    def pair(chosen: str, rejected: str) -> CandidateSet:
        written = (Candidate(chosen, CHOSEN_SOURCE), Candidate(rejected, REJECTED_SOURCE))
        return CandidateSet("id", "q", None, written)

    sets = [pair("a", "bb"), pair("a", "bb"), pair("aaa", "bb"), pair("cc", "bb")]
    share, low, high, count = shorter_reply_accuracy(sets)
    assert (share, count) == (2.5 / 4, 4)
    # Wilson by hand: centre (p + z^2/2n) / (1 + z^2/n) = 0.5638, half width 0.3445.
    assert abs(low - 0.2194) < 2e-3 and abs(high - 0.9083) < 2e-3
