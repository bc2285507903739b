"""PPO and online RRHF with a real vLLM server on a CPU, and the five faults that must stop them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Zygote
from ppo_cases import save_prompts
from test_ppo_vllm import LORA, unmerged
from trainer_cases import metrics_of
from vllm_cases import config, rollouts
from vllm_real import PYTHON, RealServer, needs_vllm, real_server, save_head_dim_32

from rrhf.data.chat_format import ChatCodec
from rrhf.generation.build import EngineOptions
from rrhf.generation.engine import answers
from rrhf.generation.params import SamplingParams
from rrhf.generation.vllm.engine import VLLMEngine
from rrhf.generation.vllm.http import JsonServer
from rrhf.generation.vllm.server import VLLMServer
from rrhf.generation.vllm.settings import VLLMSettings
from rrhf.models import untied
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.records import CandidateSet
from rrhf.training.online import ppo, weight_sync
from rrhf.training.online.weight_sync import LostSampler

pytestmark = [pytest.mark.slow, needs_vllm]
WINDOW = ["--max_model_len", "256"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    save_head_dim_32(folder / "model")
    save_prompts(folder / "prompts.jsonl")
    return folder


@pytest.fixture(scope="module")
def server(world: Path) -> Iterator[RealServer]:
    with real_server(world / "model", world / "server.log", more=WINDOW) as running:
        yield running


def assert_right(run: Path, count: int = 2) -> None:
    found = rollouts(run)
    assert len(found) == count
    for row in found:
        gaps = [row[f"canary_gap_{name}"] for name in ("prompt", "sampled", "filtered")]
        assert max(gaps) < 1e-4 and row["sampler_gap_max"] < 1e-3, row


@pytest.mark.timeout(400)
@pytest.mark.parametrize("method", ["ppo", "rrhf"])
def test_training_on_responses_of_the_live_policy(
    world: Path, server: RealServer, tmp_path: Path, method: str
) -> None:
    changes = {} if method == "ppo" else {"method": method}
    ppo.train(config(world, tmp_path / "run", server.url, **changes))
    assert_right(tmp_path / "run")
    if method == "ppo":
        ratios = {
            row["step"]: row["largest_ratio"]
            for row in metrics_of(tmp_path / "run")
            if "largest_ratio" in row
        }
        assert ratios[1] == pytest.approx(1.0, abs=1e-3) == ratios[5]


@pytest.mark.timeout(400)
def test_more_prompts_than_are_read_in_one_step(world: Path, server: RealServer) -> None:
    """vLLM 0.32 on a CPU ends if a seeded prompt is read in pieces."""
    model, codec = (load_causal_lm(world / "model"), ChatCodec(load_tokenizer(world / "model")))
    options = EngineOptions(
        str(world / "model"),
        lambda: model,
        lambda: codec,
        max_batch_rows=128,
        max_prompt_tokens=200,
        settings=VLLMSettings(base_url=server.url, server_retries=0),
    )
    asked = [CandidateSet(str(n), f"{n} say it now, and again: {'fox ' * 60}") for n in range(64)]
    found = answers(VLLMEngine(options), asked, SamplingParams(2, 8, seed=3))
    assert len(found) == 64 and all(len(one) == 2 for one in found)


def skip(self: VLLMServer, folder: Path) -> None:
    """The weights are not given."""


def keep_cache(self: VLLMServer, folder: Path) -> None:
    """What the old weights computed is kept."""
    self.http.post("/pause?mode=abort&clear_cache=false", {}, 60)
    call = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
    self.http.post("/collective_rpc", call, 60)
    self.http.post("/resume", {}, 60)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("fault", "said"), [("skip", "prompt"), ("cache", "sampled"), ("adapters", "prompt")]
)
def test_a_fault_of_the_sync_stops_the_run(
    world: Path, server: RealServer, tmp_path: Path, monkeypatch: Any, fault: str, said: str
) -> None:
    """At the second sync; before the first, the server is given the model of the start."""
    changes: dict[str, Any] = {"server_retries": 0}
    if fault == "adapters":
        monkeypatch.setattr(untied, "merged_weights", unmerged)
        changes |= {**LORA, "learning_rate": 3e-2}
    else:
        right, calls = VLLMServer.load, []
        wrong = {"skip": skip, "cache": keep_cache}[fault]

        def load(self: VLLMServer, folder: Path) -> None:
            calls.append(folder)
            (right if len(calls) == 1 else wrong)(self, folder)

        monkeypatch.setattr(VLLMServer, "load", load)
    with pytest.raises(LostSampler, match=rf"on eight canary texts \({said}\)"):
        ppo.train(config(world, tmp_path / "run", server.url, **changes))
    assert_right(tmp_path / "run", count=1)


def plain_command(model: Path) -> list[str]:
    """A server that is started by hand, of the model as it is."""
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "256"]
    return [*command, "--enforce-eager"]


@pytest.mark.timeout(400)
def test_processed_log_probs_stop_the_run(world: Path, tmp_path: Path) -> None:
    command = [*plain_command(world / "model"), "--logprobs-mode", "processed_logprobs"]
    with (
        real_server(world / "model", tmp_path / "log", command) as server,
        pytest.raises(LostSampler, match=r"on eight canary texts \(filtered\)"),
    ):
        ppo.train(config(world, tmp_path / "run", server.url, server_retries=0))


needs_smollm2 = pytest.mark.skipif(
    "RRHF_SMOLLM2" not in os.environ, reason="RRHF_SMOLLM2 names no folder of SmolLM2-135M"
)
SHORT = {"rollout_size": 6, "ppo_epochs": 1, "learning_rate": 1e-4, "max_new_tokens": 12}


def smollm2(world: Path, run: Path, url: str, **changes: Any) -> ppo.PPOConfig:
    made = config(world, run, url, **{**SHORT, "request_seconds": 120.0, **changes})
    return replace(made, model_name_or_path=os.environ["RRHF_SMOLLM2"])


@pytest.mark.timeout(600)
@needs_smollm2
def test_smollm2_in_an_untied_copy(world: Path, tmp_path: Path) -> None:
    model = Path(os.environ["RRHF_SMOLLM2"])
    with real_server(model, tmp_path / "log", more=WINDOW) as server:
        ppo.train(smollm2(world, tmp_path / "run", server.url))
    assert_right(tmp_path / "run")


def write_tied(folder: Path, model: Any, temperature: float) -> None:
    """A folder as other programs write it: the output layer is left out, as it is shared."""
    model.save_pretrained(folder)


@pytest.mark.timeout(400)
def test_a_shared_output_layer_stops_the_run(world: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A server of a tied model keeps a packed copy of the output layer (vLLM 0.32 on a CPU)."""
    monkeypatch.setattr(weight_sync, "write_untied_folder", write_tied)
    command = plain_command(world / "model")
    with (
        real_server(world / "model", tmp_path / "log", command) as server,
        pytest.raises(LostSampler, match=r"on eight canary texts \(prompt\)"),
    ):
        ppo.train(config(world, tmp_path / "run", server.url, server_retries=0))
    assert_right(tmp_path / "run", count=1)


TRAINER_KILLS = [
    ("rrhf.generation.vllm.engine:VLLMEngine._sample", 3),
    ("rrhf.generation.vllm.server:VLLMServer.load", 1),
    ("rrhf.generation.vllm.canaries:Canaries.check", 1),
    ("rrhf.training.core.parallel:Parallel.backward", 1),
    ("rrhf.training.core.checkpoint:seal_folder", 1),
    ("rrhf.training.core.parallel:Parallel.take_step", 2),
    ("rrhf.training.core.parallel:Parallel.backward", 3),
    ("rrhf.training.core.parallel:Parallel.take_step", 2),
    # The second rollout.
    ("rrhf.training.online.weight_sync:write_untied_folder", 1),
    ("rrhf.generation.vllm.http:JsonServer.post", 3),
    ("rrhf.generation.vllm.engine:VLLMEngine._sample", 9),
    ("rrhf.generation.vllm.canaries:Canaries.check", 2),
    ("rrhf.training.online.logprob_pass:LogprobPass.compute", 1),
    ("rrhf.training.core.parallel:Parallel.backward", 1),
    ("rrhf.training.core.parallel:Parallel.take_step", 2),
    ("rrhf.training.core.update:Update._metrics", 2),
]


@pytest.mark.timeout(1200)
def test_twenty_kills_of_trainer_and_server(
    world: Path, server: RealServer, tmp_path: Path, monkeypatch: Any
) -> None:
    """Sixteen of the trainer, four of the server: in a sync, while sampling, and in a step."""
    run = tmp_path / "run"
    changes = {"save_steps": 1, "server_wait_seconds": 240.0, "server_retries": 3}
    arguments = {"world": str(world), "output_dir": str(run), "url": server.url, **changes}
    job = Zygote("vllm_cases:train_again", arguments)
    killed = []
    for number, call in enumerate(TRAINER_KILLS):
        killed.append(job.run(kill_at_call=call)["signal"])
        if number in (0, 7, 12):  # and the server while nobody looks
            server.kill()
            server.start()
            server.wait()
    assert job.run()["exit"] == 0 and killed == [9] * len(TRAINER_KILLS)
    assert_right(run)
    straight = tmp_path / "straight"
    plain, calls = VLLMEngine._sample, []

    def killing(self: VLLMEngine, *words: Any) -> Any:
        calls.append(words)
        if len(calls) == 15:  # in the second rollout, while it samples
            server.kill()
            server.start()
        return plain(self, *words)

    monkeypatch.setattr(VLLMEngine, "_sample", killing)
    ppo.train(config(world, straight, server.url, **changes))
    assert_right(straight)
    assert [row["sampler_redraws"] for row in rollouts(straight)] == [0, 1]
    mine, its = (load_causal_lm(path / "policy").state_dict() for path in (run, straight))
    for name, value in mine.items():  # vLLM's rounding depends on what it computes at a time
        torch.testing.assert_close(value, its[name], atol=1e-4, rtol=0)
    JsonServer(server.url).get("/v1/models", 10)
