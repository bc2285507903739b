"""Two ranks on one machine, spread by DDP and by FSDP2."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny import tiny_llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForSequenceClassification

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.models.forward.layouts import build_policy
from rrhf.models.reward_layouts import build_reward_model


def batch(rank: int) -> TokenBatch:
    """What a rank reads: one prompt with three responses."""
    generator = torch.Generator().manual_seed(rank)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 80, (length,), generator=generator).tolist()

    return collate([EncodedSet(ids(5 + rank), [ids(3), ids(6), ids(4)])], pad_id=2)


def ddp(root: nn.Module) -> nn.Module:
    return DistributedDataParallel(root)


def fsdp(root: nn.Module) -> nn.Module:
    inner: Any = root.model
    for module in (*inner.model.layers, root):
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
    return root


def policy(layout: str) -> nn.Module:
    return build_policy(tiny_llama(80), layout)


def reward_model(layout: str) -> nn.Module:
    config = tiny_llama(80).config
    config.num_labels = 1
    torch.manual_seed(0)
    return build_reward_model(LlamaForSequenceClassification(config).eval(), layout)


def loss(root: nn.Module, rank: int) -> Tensor:
    outputs = root(batch(rank))
    return getattr(outputs, "logprobs", outputs).square().sum()


def gradient(rank: int, spread: Callable[[nn.Module], nn.Module], root: nn.Module) -> Tensor:
    """The mean of the two ranks' gradients, as training gives it."""
    root = spread(root)
    loss(root, rank).backward()
    parts = []
    for parameter in root.parameters():
        found: Any = parameter.grad
        whole = found.full_tensor() if hasattr(found, "full_tensor") else found
        parts.append(whole.flatten())
    return torch.cat(parts)


def rank_of_two(out: str) -> None:
    rank = int(os.environ["RANK"])
    faulthandler.dump_traceback_later(500, exit=True)  # neither rank waits for the other for ever
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{out}/store", 2), rank=rank, world_size=2
    )
    found = {
        f"{make.__name__} {spread.__name__} {layout}": gradient(rank, spread, make(layout))
        for make in (policy, reward_model)
        for spread in (ddp, fsdp)
        for layout in ("shared_prefix", "dense_mask")
    }
    if rank == 0:
        torch.save(found, Path(out) / "gradients.pt")
