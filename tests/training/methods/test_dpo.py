"""DPO on lists: the loss against loops, the reference, and trainings by the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_settings import build_objective, rank_config
from tiny import save_tiny, tiny_llama
from trainer_cases import metrics_of, ranked_rows, same_weights, write_lines

from rrhf.algorithms.pair_losses import chosen_pairs, logistic_loss
from rrhf.cli.main import main
from rrhf.data.collate import EncodedSet, collate
from rrhf.models.forward.logprobs import Policy
from rrhf.training.methods import rank

SCORES = [
    [2.0, 1.0, 1.0, 0.0, 2.0],
    [0.5, 0.5, math.nan, math.nan, math.nan],
    [1.0, math.nan, math.nan, math.nan, math.nan],
    [-3.0, 4.0, 0.0, math.nan, math.nan],
]
WHICH = ("all", "best-worst", "adjacent")


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.tensor(SCORES)
    return scores, ~scores.isnan()


def slow_pairs(scores: list[float], which: str) -> set[tuple[int, int]]:
    """(worse, better) by loops over the candidates that exist."""
    known = [i for i, score in enumerate(scores) if not math.isnan(score)]
    pairs = {(i, j) for i in known for j in known if scores[i] < scores[j]}
    if which == "best-worst" and pairs:
        best = min(known, key=lambda i: (-scores[i], i))
        worst = min(known, key=lambda i: (scores[i], i))
        return {(worst, best)}
    if which == "adjacent":
        return {
            (i, j) for i, j in pairs if not any(scores[i] < scores[k] < scores[j] for k in known)
        }
    return pairs


@pytest.mark.parametrize("which", WHICH)
def test_pairs_equal_loops(which: str) -> None:
    found = chosen_pairs(*tables(), which)
    for row, scores in zip(found, SCORES, strict=True):
        assert {tuple(pair) for pair in row.nonzero().tolist()} == slow_pairs(scores, which)


@pytest.mark.parametrize("which", WHICH)
def test_the_loss_and_its_gradient_equal_loops(which: str) -> None:
    rewards = torch.randn((4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    holes = rewards.clone()
    holes[~tables()[1]] = math.nan  # what does not exist is never read
    holes.requires_grad_()
    found = logistic_loss(holes, chosen_pairs(*tables(), which))
    found.sum().backward()
    for b, scores in enumerate(SCORES):
        loss, gradient = 0.0, [0.0] * 5
        for i, j in slow_pairs(scores, which):
            lead = float(rewards[b, j] - rewards[b, i])
            loss += math.log1p(math.exp(-lead))
            pull = 1 / (1 + math.exp(lead))
            gradient[j] -= pull
            gradient[i] += pull
        assert float(found[b].detach()) == pytest.approx(loss, abs=1e-12)
        assert holes.grad is not None
        assert holes.grad[b].tolist() == pytest.approx(gradient, abs=1e-12)


def examples() -> list[EncodedSet]:
    return [
        EncodedSet([5, 6, 7], [[8, 9, 1], [4, 1], [11, 12, 13, 1]], [0.0, 2.0, 1.0]),
        EncodedSet([9], [[3, 3, 1], [7, 1]], [1.0, 1.0]),
        EncodedSet([20, 21], [[30, 1], [31, 32, 1]], [1.0, -1.0]),
    ]


@pytest.mark.parametrize(("reduction", "count"), [("prompt", 2), ("pair", 4)])
def test_terms_of_a_batch(reduction: str, count: int) -> None:
    """Against one unpadded row at a time, with another model as the reference."""
    policy, reference = Policy(tiny_llama()), Policy(tiny_llama(seed=5))
    config = rank_config(
        "m", "o", data_path="d", objective="dpo", beta=0.3, pair_reduction=reduction
    )
    objective = build_objective(config, lambda batch: reference(batch).logprobs.detach())
    sets = examples()
    batch = collate(sets, 2)
    assert float(objective.denominators(batch)["dpo"]) == count
    term = objective(policy(batch), batch)["dpo"]
    wanted = 0.0
    for one in sets:
        rewards = []
        for ids in one.response_ids:
            row = collate([EncodedSet(one.prompt_ids, [ids])], 2)
            both = [float(model(row).logprobs.sum().detach()) for model in (policy, reference)]
            rewards.append(0.3 * (both[0] - both[1]))
        pairs = slow_pairs(list(one.scores or ()), "all")
        losses = [math.log1p(math.exp(rewards[i] - rewards[j])) for i, j in pairs]
        wanted += sum(losses) / (len(losses) if reduction == "prompt" and losses else 1)
    assert float(term.total.detach()) == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    save_tiny(folder / "model")
    write_lines(folder / "ranked.jsonl", ranked_rows())
    return folder


def command(world: Path, out: Path, **flags: Any) -> None:
    values = {
        "model_name_or_path": world / "model",
        "data_path": world / "ranked.jsonl",
        "output_dir": out,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 3,
        "model_max_length": 100,
        **flags,
    }
    assert main(["train", "dpo", *(f"--{name}={value}" for name, value in values.items())]) == 0


@pytest.mark.parametrize("which", WHICH)
def test_the_command_learns_the_order(world: Path, tmp_path: Path, which: str) -> None:
    command(world, tmp_path / "run", pairs=which, num_train_epochs=10)
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    # Before the first step policy and reference are one: every pair costs log 2.
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["implicit_reward"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["loss"] < 0.9 * math.log(2)
    assert rows[-1]["ranking_accuracy"] > 0.8
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["objective"] == "dpo" and settings["pairs"] == which
    assert "rrhf_weight" not in settings and "objective_settings" not in settings


def test_settings_of_a_run_repeat_it(world: Path, tmp_path: Path) -> None:
    command(world, tmp_path / "one", beta=0.5)
    config = str(tmp_path / "one" / "settings.json")
    assert main(["train", "rank", "--config", config, "--output_dir", str(tmp_path / "two")]) == 0
    assert same_weights(tmp_path / "one" / "policy", tmp_path / "two" / "policy")


def test_a_resumed_run_ends_in_the_same_bits(world: Path, tmp_path: Path) -> None:
    def train(out: Path, **changes: Any) -> None:
        values: dict[str, Any] = {"objective": "dpo", "learning_rate": 1e-3, **changes}
        values |= {"data_path": str(world / "ranked.jsonl"), "per_device_train_batch_size": 3}
        values |= {"model_max_length": 100}
        rank.train(rank_config(str(world / "model"), str(out), max_steps=6, save_steps=2, **values))

    class PowerCut(Exception):
        pass

    train(tmp_path / "straight")
    plain, calls = rank.RankObjective.__call__, iter(range(100))

    def failing(self: Any, outputs: Any, batch: Any) -> Any:
        if next(calls) == 4:
            raise PowerCut
        return plain(self, outputs, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank.RankObjective, "__call__", failing)
        with pytest.raises(PowerCut):
            train(tmp_path / "cut")
    train(tmp_path / "cut", resume_from_checkpoint=True)
    assert same_weights(tmp_path / "straight" / "policy", tmp_path / "cut" / "policy")


def test_with_adapters_the_reference_is_the_policy_without_them(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    loaded: list[Any] = []
    monkeypatch.setattr("rrhf.training.core.reference.load_causal_lm", loaded.append)
    lora = {"use_lora": "true", "lora_r": 4, "num_train_epochs": 10, "learning_rate": 1e-2}
    command(world, tmp_path / "run", **lora)
    assert not loaded, "no second model is loaded"
    rows = [row for row in metrics_of(tmp_path / "run") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_where_nothing_has_an_order_the_command_says_so(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "scores": [1.0] * len(row["scores"])} for row in ranked_rows()]
    data = write_lines(tmp_path / "tied.jsonl", rows)
    command(world, tmp_path / "run", data_path=data, max_steps=1)
    assert "no prompt has two candidates with different scores" in caplog.text
    assert same_weights(world / "model", tmp_path / "run" / "policy")
