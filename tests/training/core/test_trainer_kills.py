"""The trainers on offline data, killed at random moments, and over two processes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from kills import Zygote
from safetensors.torch import load_file
from tiny import save_tiny
from trainer_cases import metrics_of, ranked_rows, same_weights, write_lines

NUM_KILLS = 20
STAGES = ("rank", "sft")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """14 prompts, 6 a step: the last step of an epoch leaves a rank short."""
    return str(write_lines(tmp_path_factory.mktemp("data") / "ranked.jsonl", ranked_rows(14)))


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_random_kills_change_no_bit(
    stage: str, model: str, data: str, tmp_path: Path
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    settings = {"stage": stage, "model": model, "data": data}
    with Zygote("trainer_cases:train", {**settings, "output_dir": str(straight)}) as zygote:
        first = zygote.run()
        assert first["exit"] == 0
    moments, kills = random.Random(11), 0
    with Zygote("trainer_cases:train", {**settings, "output_dir": str(run)}) as zygote:
        while kills < NUM_KILLS:
            answer = zygote.run(kill_after_seconds=moments.uniform(0.0, 0.9) * first["seconds"])
            if answer["signal"]:
                kills += 1
                continue
            assert answer["exit"] == 0
            assert same_weights(run / "policy", straight / "policy")
            shutil.rmtree(run)
        assert zygote.run()["exit"] == 0
    assert same_weights(run / "policy", straight / "policy")
    timeless = [
        [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in metrics_of(folder)]
        for folder in (run, straight)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_like_one(stage: str, model: str, data: str, tmp_path: Path) -> None:
    from trainer_cases import train

    train(stage, model, data, str(tmp_path / "one"))
    settings = {"stage": stage, "model": model, "data": data, "output_dir": str(tmp_path / "two")}
    with Zygote("trainer_cases:train_two_processes", settings) as zygote:
        assert zygote.run_ranks() == [0, 0]
    for mine, theirs in zip(
        metrics_of(tmp_path / "two"), metrics_of(tmp_path / "one"), strict=True
    ):
        for name in theirs.keys() - {"tokens_per_second"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    one, two = (
        load_file(tmp_path / name / "policy" / "model.safetensors") for name in ("one", "two")
    )
    # Float32 sums in another order differ by 1e-7; Adam's steps of 1e-2 make more of it.
    assert max(float((one[k] - two[k]).abs().max()) for k in one) < 1e-3
