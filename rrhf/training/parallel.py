"""The one room that knows how the model is spread: one process, DDP, FSDP2 or DeepSpeed.

All of it is accelerate's work, started by `accelerate launch` or `torchrun`. The loop sets the
step boundaries itself (accumulation is 1 for the engine) and multiplies each loss by the number of
ranks, because every engine averages gradients over them while our losses are already divided by
global counts.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from rrhf.errors import UserError


class Parallel:
    """Ranks, devices and reductions.

    Args:
        bf16: mixed precision in bfloat16.

    Raises:
        UserError: the launcher asked for sharding that this machine silently would not do.
    """

    def __init__(self, bf16: bool = False) -> None:
        deepspeed = _is_set("ACCELERATE_USE_DEEPSPEED")
        on_cpu = not torch.cuda.is_available()
        # One process may train several models in turn, each with its own precision.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision="bf16" if bf16 else "no",
            cpu=on_cpu and not deepspeed,
            gradient_accumulation_steps=1,
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        kind = self.accelerator.distributed_type.value
        self.kind = str(kind)
        if _is_set("ACCELERATE_USE_FSDP") and self.kind != "FSDP":
            raise UserError(
                f"launch: FSDP was asked for, but accelerate runs {self.kind} on this machine; "
                "FSDP needs GPUs here: choose another launch file"
            )
        if deepspeed and self.kind != "DEEPSPEED":
            raise UserError(f"launch: DeepSpeed was asked for, but accelerate runs {self.kind}")
        if bf16 and self.accelerator.is_fsdp2:
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = sharded_bf16()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """True where no rank holds the whole model."""
        return self.kind in ("FSDP", "DEEPSPEED")

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The trainable root and its optimiser, spread as the launcher asked."""
        if self.kind == "DEEPSPEED":  # it clips by itself, so it must be told here
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
            plugin.deepspeed_config["gradient_clipping"] = max_grad_norm
        # FSDP2 cuts at the layers that the root names; ours stand inside it.
        model._no_split_modules = sorted(layer_classes(model))  # type: ignore[assignment]
        self._root, spread_optimizer = self.accelerator.prepare(model, optimizer)
        return self._root, spread_optimizer

    @contextlib.contextmanager
    def micro_step(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are exchanged on the last."""
        self.accelerator.sync_gradients = is_last
        with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add gradients of a loss that is already divided by global counts."""
        self.accelerator.backward(loss * self.world_size)

    def clip_gradients(self, model: nn.Module, max_norm: float) -> float:
        """Scale gradients to the norm; returns the norm before (nan where the engine hides it)."""
        if self.kind == "DEEPSPEED":
            norm = getattr(model, "get_global_grad_norm", lambda: None)()
        else:
            limit = max_norm if max_norm > 0 else math.inf
            norm = self.accelerator.clip_grad_norm_(model.parameters(), limit)
        if norm is None:
            return math.nan
        full = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return float(full)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, on every rank."""
        if self.world_size == 1:
            return values
        summed: Any = self.accelerator.reduce(values.to(self.device), reduction="sum")
        return summed.to(values.device)

    def gather(self, rows: list[Any]) -> list[Any]:
        """The rows of every rank, in the order of the ranks, on every rank; they are pickled."""
        return rows if self.world_size == 1 else list(gather_object(rows))

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The precision of training, for a forward that does not pass the prepared root."""
        context: contextlib.AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def max(self, value: float) -> float:
        """The largest of the ranks' values, on every rank."""
        if self.world_size == 1:
            return value
        values = torch.zeros(self.world_size, dtype=torch.float64)
        values[self.rank] = value
        return float(self.sum(values).max())

    def any(self, flag: bool) -> bool:
        """True on every rank if it is True on one."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), dtype=torch.float64)) > 0)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The trainable root without the engine's wrapping."""
        unwrapped: nn.Module = self.accelerator.unwrap_model(model)
        return unwrapped

    def full_state_dict(self) -> dict[str, Tensor]:
        """All weights of the root in full, on the main rank; every rank must call it.

        From the root as `prepare` gave it: only DeepSpeed's wrapping can gather its shards.
        """
        return dict(self.accelerator.get_state_dict(self._root))


def sharded_bf16() -> MixedPrecisionPolicy:
    """What bf16 means under FSDP2: layers compute in it; sums over ranks and outputs stay float32.

    accelerate's own policy also rounds whatever the root returns, so log-probs and scores, and adds
    gradients up in bfloat16.
    """
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def layer_classes(model: nn.Module) -> set[str]:
    """Class names of the layers that a Hugging Face model inside `model` wants kept whole."""
    return {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }


def launched_place() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine), for work before any training begins."""
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    rank, world_size, local_rank = (int(os.environ.get(*name)) for name in names)
    return rank, world_size, local_rank


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes")
