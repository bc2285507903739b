"""How the model is spread: what FSDP2 makes of our roots, tried on one CPU process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForSequenceClassification

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.models.logprobs import Policy
from rrhf.models.reward_engines import build_reward_model
from rrhf.models.reward_model import RewardModel
from rrhf.training.parallel import Parallel, sharded_bf16

BATCH = collate(
    [EncodedSet([5, 6, 7], [[8, 9, 1], [4, 1]]), EncodedSet([9], [[3, 3, 3, 1]])], pad_id=2
)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    """A mesh of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def sharded(root: nn.Module, layers: nn.ModuleList, mesh: Any) -> nn.Module:
    for module in (*layers, root):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=sharded_bf16())
    return root


def rounded(values: torch.Tensor) -> torch.Tensor:
    return values.bfloat16().float()


def test_log_probs_stay_float32_where_layers_are_bfloat16(one_rank: Any) -> None:
    model = tiny_llama()
    with torch.no_grad():
        plain = Policy(model)(BATCH).logprobs
    logprobs = forward(sharded(Policy(model), model.model.layers, one_rank)).logprobs
    assert logprobs.dtype == torch.float32
    assert not torch.equal(logprobs, rounded(logprobs)), "log-probs were rounded to bfloat16"
    torch.testing.assert_close(logprobs, plain, atol=0.1, rtol=0.05)
    logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_scores_stay_float32_where_layers_are_bfloat16(one_rank: Any) -> None:
    config = tiny_llama().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        plain = RewardModel(model)(BATCH)
    scores = forward(sharded(RewardModel(model), model.model.layers, one_rank))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, rounded(scores)), "scores were rounded to bfloat16"
    torch.testing.assert_close(scores, plain, atol=0.1, rtol=0.05)
    scores.sum().backward()


@pytest.mark.parametrize("engine", ["padded", "shared_prefix", "dense_mask"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.filterwarnings("error")
def test_no_root_of_scores_returns_a_view(one_rank: Any, engine: str, per_token: bool) -> None:
    """FSDP2 would lose its hook where somebody changed one in place, and warns each user of it."""
    config = tiny_llama().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    root = build_reward_model(model, engine, per_token)
    scores = sharded(root, model.model.layers, one_rank)(BATCH)
    assert scores._base is None
    scores.sum().backward()


def forward(root: nn.Module, batch: TokenBatch = BATCH) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return root(batch)


def test_full_weights_are_asked_of_the_root_as_it_was_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeepSpeed's stage 3 gathers shards by a method of its wrapping, which `unwrap` takes off."""
    parallel = Parallel()
    wrapped = nn.Linear(1, 1)
    weights = {id(wrapped): {"weight": wrapped.weight}}
    monkeypatch.setattr(parallel.accelerator, "prepare", lambda model, optimizer: (wrapped, None))
    monkeypatch.setattr(parallel.accelerator, "get_state_dict", lambda root: weights[id(root)])
    bare = nn.Linear(1, 1)
    parallel.prepare(bare, torch.optim.AdamW(bare.parameters()), 1.0)
    assert parallel.full_state_dict() == {"weight": wrapped.weight}


@pytest.mark.parametrize(
    ("kind", "world_size", "problem"),
    [("FSDP", 2, "FSDP left weight"), ("MULTI_GPU", 2, "averages no gradients")],
)
def test_a_root_that_was_not_spread_as_asked_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, world_size: int, problem: str
) -> None:
    parallel = Parallel()
    parallel.kind, parallel.world_size = kind, world_size
    monkeypatch.setattr(parallel.accelerator, "prepare", lambda model, optimizer: (model, None))
    model = nn.Linear(1, 1)
    with pytest.raises(AssertionError, match=problem):
        parallel.prepare(model, torch.optim.AdamW(model.parameters()), 1.0)


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Parallel()  # from here on this process is known to be alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but accelerate sees 1"):
        Parallel()
