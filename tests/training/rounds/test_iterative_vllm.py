"""Rounds of sampling by a server that is given each round's policy."""

from __future__ import annotations

from pathlib import Path

import pytest
from iterative_cases import build_world, settings
from vllm_stand_in import stand_in

from rrhf.data.candidate_files import read_candidate_sets
from rrhf.errors import UserError
from rrhf.generation.config import GenerateConfig
from rrhf.generation.stage import generate_file
from rrhf.generation.vllm.settings import VLLMSettings
from rrhf.training.rounds import iterative


def test_each_round_samples_from_the_policy_before(tmp_path: Path) -> None:
    """What a server of the first round's policy writes is what the second round ranked."""
    world = build_world(tmp_path / "world")
    run = tmp_path / "run"
    with stand_in(world / "model") as server:
        asked = VLLMSettings(base_url=server.url)
        iterative.train(settings(world, run, engine="vllm", engine_settings=asked))
        assert server.seen["/collective_rpc"] == 1
    policy = run / "round-1" / "rank" / "policy"
    with stand_in(policy) as server:
        again = GenerateConfig(
            str(policy),
            prompts=str(world / "pairs.jsonl"),
            output_file=str(tmp_path / "again.jsonl"),
            num_return_sequences=3,
            max_new_tokens=6,
            round=2,
            policy="round-1",
            seed=settings(world, run).seed,
            engine="vllm",
            engine_settings=VLLMSettings(base_url=server.url),
        )
        generate_file(again)
        assert server.seen["/collective_rpc"] == 0
    made = read_candidate_sets(run / "round-2" / "candidates.jsonl")
    assert list(made) == list(read_candidate_sets(tmp_path / "again.jsonl"))


def test_weights_are_always_compared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--check_weights false"):
        settings(tmp_path, "run", engine="vllm", engine_settings=VLLMSettings(check_weights=False))
