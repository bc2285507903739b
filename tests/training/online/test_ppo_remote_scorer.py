"""PPO with scores over HTTP ends with the weights of PPO with the same scorer in its process."""

from pathlib import Path

import pytest
import torch
from loopback_server import Asked, Reply, loopback
from ppo_cases import build_world, has_e, settings
from transformers import AutoModelForCausalLM

from rrhf.training.online import ppo


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("remote"))


def answer(asked: Asked) -> Reply:
    return Reply({"scores": [has_e([], s["responses"], None) for s in asked.body["sets"]]})


def test_weights_equal_those_with_the_scorer_in_the_process(world: Path, tmp_path: Path) -> None:
    with loopback(answer) as server:
        names = {"here": "function:ppo_cases:has_e", "there": f"{server.url}/score"}
        weights = {}
        for name, scorer in names.items():
            config = settings(world, tmp_path / name, reward_model_name_or_path=scorer)
            weights[name] = AutoModelForCausalLM.from_pretrained(ppo.train(config)).state_dict()
        assert server.asked
    for key, value in weights["here"].items():
        assert torch.equal(value, weights["there"][key]), key
