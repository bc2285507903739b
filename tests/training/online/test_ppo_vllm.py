"""PPO and online ranking with responses from a server: canaries, negative controls, restarts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import Zygote
from ppo_cases import build_world
from safetensors.torch import load_file
from tiny import save_tiny
from trainer_cases import same_weights
from vllm_cases import config, rollouts, rows
from vllm_stand_in import StandIn, stand_in

from rrhf.errors import UserError
from rrhf.models import untied
from rrhf.models.loading import load_causal_lm
from rrhf.training.online import ppo
from rrhf.training.online.weight_sync import LostSampler


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def server(world: Path) -> Iterator[StandIn]:
    with stand_in(world / "model") as running:
        yield running


@pytest.fixture(scope="module")
def straight(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs: two rollouts of four steps."""
    run = tmp_path_factory.mktemp("straight") / "run"
    with stand_in(world / "model") as server:
        ppo.train(config(world, run, server.url))
    return run


def assert_same(run: Path, straight: Path) -> None:
    assert rows(run) == rows(straight)
    assert same_weights(run / "policy", straight / "policy")


LORA = {"method": "rloo", "use_lora": True, "num_return_sequences": 2}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="ppo"),
        pytest.param({"method": "rrhf"}, id="rrhf"),
        pytest.param({"method": "grpo", "temperature": 0.7}, id="grpo", marks=pytest.mark.slow),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
    ],
)
def test_methods_train_on_responses_of_the_live_policy(
    world: Path, server: StandIn, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Canaries agree after every sync, and so do the log-probs of the responses themselves."""
    ppo.train(config(world, tmp_path / "run", server.url, **changes))
    found = rollouts(tmp_path / "run")
    assert len(found) == server.seen["/collective_rpc"] == 2
    for row in found:
        gaps = [row[f"canary_gap_{name}"] for name in ("prompt", "sampled", "filtered")]
        assert max(gaps) < 1e-5 and row["sampler_gap_max"] < 1e-4, row
        assert row["sampler_redraws"] == 0
    assert len({body["seed"] for body in server.bodies}) == len(server.bodies)
    assert not list((tmp_path / "run").glob(".for-the-sampler*"))
    first = load_file(world / "model" / "model.safetensors")
    last = load_file(tmp_path / "run" / "policy" / "model.safetensors")
    assert any((first[name] - last[name]).abs().max() > 1e-4 for name in first)


def test_the_first_step_on_a_rollout_has_ratios_of_one(straight: Path) -> None:
    largest = {row["step"]: row["largest_ratio"] for row in rows(straight) if "loss" in row}
    assert largest[1] == pytest.approx(1.0, abs=1e-3) == largest[5]
    assert largest[4] > 1.01, "and the later ones have not, so the first are no accident"


def unmerged(model: Any, state: Any) -> Any:
    """The weights under the adapters, alone."""
    kept = {name: value for name, value in state.items() if ".lora_" not in name}
    plain = untied_names(kept)
    return {name: value.detach().cpu() for name, value in plain.items()}


def untied_names(state: Any) -> Any:
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("tied", r"on eight canary texts \(prompt\)"),
        ("cache", r"on eight canary texts \(sampled\).*its cache of prompts still holds"),
        ("skip", r"on eight canary texts \(prompt\)"),
        ("adapters", r"on eight canary texts \(prompt\)"),
        ("processed", r"on eight canary texts \(filtered\).*raw_logprobs"),
    ],
)
def test_each_planted_fault_stops_the_run(
    world: Path, server: StandIn, tmp_path: Path, monkeypatch: Any, fault: str, said: str
) -> None:
    """Five negative controls; all but the last show at the second sync, when weights have moved."""
    changes: dict[str, Any] = {}
    if fault == "adapters":
        monkeypatch.setattr(untied, "merged_weights", unmerged)
        changes = {**LORA, "learning_rate": 3e-2}
    server.faults.add(fault)
    with pytest.raises(LostSampler, match=said) as caught:
        ppo.train(config(world, tmp_path / "run", server.url, server_retries=0, **changes))
    assert "--resume_from_checkpoint" in str(caught.value)
    if fault == "processed":  # nothing was trained on, so nothing is kept
        assert not (tmp_path / "run").exists()
        return
    assert len(rollouts(tmp_path / "run")) == 1
    kept = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert [path.name for path in kept] == ["step-4"]


def test_a_skipped_sync_shows_even_where_the_policy_hardly_moved(
    world: Path, server: StandIn, tmp_path: Path
) -> None:
    server.faults.add("skip")
    slow = {"learning_rate": 1e-6, "critic_learning_rate": 0.0, "server_retries": 0}
    with pytest.raises(LostSampler, match="still has the weights of the last sync"):
        ppo.train(config(world, tmp_path / "run", server.url, **slow))


def wrong_weights(server: StandIn, tmp_path: Path) -> None:
    """Another program gives the server other weights."""
    server.model = load_causal_lm(save_tiny(tmp_path / "other", seed=7))
    server.cache.clear()


def restart(server: StandIn, tmp_path: Path) -> None:
    server.kill()
    later = threading.Timer(0.5, server.start)
    later.daemon = True
    later.start()


def restart_unseen(server: StandIn, tmp_path: Path) -> None:
    """So fast that no request fails."""
    server.model, server.instance = load_causal_lm(server.root), "another"
    server.cache.clear()


def hang(server: StandIn, tmp_path: Path) -> None:
    server.faults.add("hang")
    later = threading.Timer(0.8, server.faults.clear)
    later.daemon = True
    later.start()


@pytest.mark.parametrize(
    "disturb",
    [
        wrong_weights,
        restart_unseen,
        pytest.param(restart, marks=pytest.mark.slow),
        pytest.param(hang, marks=pytest.mark.slow),
    ],
)
def test_a_disturbed_rollout_is_drawn_again_and_ends_equal(
    world: Path,
    server: StandIn,
    straight: Path,
    tmp_path: Path,
    disturb: Callable[[StandIn, Path], None],
) -> None:
    """In the second rollout, when the policy is no longer the model that the server starts with."""

    def once(number: int) -> None:
        if number == 15:
            disturb(server, tmp_path)

    server.on_completion = once
    ppo.train(config(world, tmp_path / "run", server.url, request_seconds=1.5))
    assert [row["sampler_redraws"] for row in rollouts(tmp_path / "run")] == [0, 1]
    assert_same(tmp_path / "run", straight)


def test_a_lost_server_leaves_a_checkpoint_and_the_resumed_run_ends_equal(
    world: Path, server: StandIn, straight: Path, tmp_path: Path
) -> None:
    server.on_completion = lambda number: server.kill() if number == 15 else None
    quick = {"server_wait_seconds": 0.3, "server_retries": 1}
    with pytest.raises(LostSampler, match=r"rrhf engine vllm start .*resume_from_checkpoint"):
        ppo.train(config(world, tmp_path / "run", server.url, **quick))
    server.on_completion = lambda number: None
    server.start()
    before = server.seen["/collective_rpc"]
    ppo.train(config(world, tmp_path / "run", server.url, resume_from_checkpoint=True))
    assert server.seen["/collective_rpc"] == before + 1, "it had the weights that it started with"
    assert_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_a_trainer_killed_in_a_rollout_in_a_sync_or_in_a_step_ends_equal(
    world: Path, server: StandIn, straight: Path, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    arguments = {"world": str(world), "output_dir": run, "url": server.url, "save_steps": 1}
    calls = [
        ("rrhf.generation.vllm.engine:VLLMEngine._sample", 3),
        ("rrhf.generation.vllm.server:VLLMServer.load", 1),
        ("rrhf.training.core.parallel:Parallel.backward", 3),
        ("rrhf.training.online.weight_sync:write_untied_folder", 1),  # of the second rollout
        ("rrhf.generation.vllm.http:JsonServer.post", 4),  # between pause and resume
        ("rrhf.generation.vllm.canaries:Canaries.check", 2),  # after the responses
        ("rrhf.training.core.parallel:Parallel.take_step", 3),
    ]
    sync_folder = tmp_path / "memory"
    arguments["sync_folder"] = str(sync_folder)
    with_kills = Zygote("vllm_cases:train_again", arguments)
    killed = [with_kills.run(kill_at_call=call)["signal"] for call in calls]
    assert with_kills.run()["exit"] == 0
    assert killed == [9] * 7
    assert not list(sync_folder.iterdir()), "what killed runs left is removed"
    assert_same(tmp_path / "run", straight)


@pytest.mark.slow
def test_two_ranks_share_one_server(world: Path, server: StandIn, tmp_path: Path) -> None:
    """One rank gives it the weights; both draw, and a disturbance makes both draw again."""
    started = time.monotonic()

    def once(number: int) -> None:
        if number == 15:
            restart_unseen(server, tmp_path)

    server.on_completion = once
    arguments = {"world": str(world), "output_dir": str(tmp_path / "run"), "url": server.url}
    job = Zygote("vllm_cases:train_again", {**arguments, "gradient_accumulation_steps": 1})
    assert job.run_ranks() == [0, 0]
    assert server.seen["/collective_rpc"] == 3
    found = rollouts(tmp_path / "run")
    assert [row["sampler_redraws"] for row in found] == [0, 1]
    assert max(row["canary_gap_prompt"] for row in found) < 1e-5
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("name", ["top_k", "top_p", "repetition_penalty"])
def test_filters_are_refused(world: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"--{name} .*unfiltered policy"):
        config(
            world, tmp_path / "run", "http://127.0.0.1:1", **{name: 2 if name == "top_k" else 0.9}
        )


def test_a_missing_server_is_said_before_a_model_is_loaded(
    world: Path, server: StandIn, tmp_path: Path, monkeypatch: Any
) -> None:
    server.kill()
    monkeypatch.setattr(ppo, "build_root", None)
    with pytest.raises(UserError, match="rrhf engine vllm start MODEL"):
        ppo.train(config(world, tmp_path / "run", server.url))
    assert not (tmp_path / "run").exists()
    server.start()


def test_a_server_that_takes_no_weights_is_refused(world: Path, tmp_path: Path) -> None:
    with (
        stand_in(world / "model", takes_weights=False) as server,
        pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"),
    ):
        ppo.train(config(world, tmp_path / "run", server.url))
