"""A training step of a 1B- and a 7B-shaped Llama on one GPU: tokens/s, share of peak, memory.

bfloat16 weights of random values, forward and backward without an optimizer, CUDA events, each way
with a model of its own that is given back before the next. Tokens are counted as a user has them,
every response with its prompt, so that ways compare; *MFU* counts the multiplications that a way
really does (without those of recomputation) against the card's dense bfloat16 peak. What does not
fit, or has no package here, is reported as such.

Written for CUDA and not measured anywhere yet; the same code runs a tiny shape on the CPU.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.harness import NotMeasured, stopwatch
from benchmarks.original_step import OriginalStyle
from benchmarks.rrhf_step import Step
from benchmarks.shapes import Shape
from rrhf.data.collate import TokenBatch
from rrhf.errors import UserError
from rrhf.models.engines import FastPolicy, build_policy
from rrhf.models.loading import check_attention, enable_checkpointing

TABLE = "gpu"
TOLERANCE = 0.1
"""Of loss and gradient, relatively, between two ways in bfloat16 over many layers."""
SETTINGS = {"peak_tflops": "dense bfloat16 peak of the card in TFLOP/s, where it is not known here"}

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A6000": 154.8,
    "L40S": 362.0,
    "L4": 121.0,
    "4090": 165.2,
    "3090": 71.0,
}
"""Dense bfloat16, from the makers' data sheets; the first name that the card's has in it counts."""


@dataclass(frozen=True)
class GpuCase:
    """A shape, and whether activations are computed again in the backward pass."""

    shape: Shape
    checkpointing: bool = False
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}{', checkpointing' if self.checkpointing else ''}"

    def model(self, device: str, attention: str) -> LlamaForCausalLM:
        """Made where it computes: seven billion float32 weights are no thing for a CPU."""
        torch.manual_seed(0)
        config = self.shape.config()
        with torch.device(device):
            model = LlamaForCausalLM._from_config(
                config, dtype=getattr(torch, self.dtype), attn_implementation=attention
            )
        if self.checkpointing:
            enable_checkpointing(model.train())
        return model


_1B = Shape(2048, 16, 128256, 1024, (256,) * 4, heads=32, key_heads=8, mlp=8192)
_7B = Shape(4096, 32, 32000, 1024, (256,) * 4, heads=32, key_heads=32, mlp=11008)

CASES = {
    "1B": GpuCase(_1B),
    "1B_checkpointed": GpuCase(_1B, checkpointing=True),
    "7B": GpuCase(_7B),
    "7B_checkpointed": GpuCase(_7B, checkpointing=True),
}
GOALS: dict[str, float] = {}

WAYS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "original": ("sdpa", OriginalStyle),
    "padded_sdpa": ("sdpa", lambda model: FastPolicy(model, "rows")),
    "padded_flash": ("flash_attention_2", lambda model: FastPolicy(model, "rows")),
    "shared_sdpa": ("sdpa", lambda model: build_policy(model, "shared_prefix")),
    "shared_flash": ("flash_attention_2", lambda model: build_policy(model, "shared_prefix")),
    "shared_flex": ("sdpa", lambda model: build_policy(model, "flex_attention")),
}
"""Attention of the model, and the door in front of it."""


def run(case: str, rounds: int, peak_tflops: str | None = None) -> dict[str, Any]:
    """Every way, one after another.

    Raises:
        NotMeasured: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise NotMeasured("no CUDA device")
    peak = float(peak_tflops) if peak_tflops else peak_of(torch.cuda.get_device_name())
    return measured(case, CASES[case], rounds, "cuda", peak)


def measured(
    name: str, case: GpuCase, rounds: int, device: str, peak_tflops: float | None
) -> dict[str, Any]:
    """On any device; the CPU has no peak and tells no memory."""
    scores = [float(number) for number in range(len(case.shape.responses))]
    batch = case.shape.batch(scores).to(device)
    found: dict[str, dict[str, Any]] = {}
    expected: tuple[float, Tensor] | None = None
    for way, (attention, door) in WAYS.items():
        try:
            check_attention(attention)
            found[way], told = _one(case, attention, door, batch, rounds, device, peak_tflops)
        except torch.OutOfMemoryError:
            found[way] = {"failed": "out of memory"}
            continue
        except (UserError, ImportError, NotImplementedError) as error:
            found[way] = {"failed": str(error)}
            continue
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
        if expected is None:
            expected = told
        loss = abs(told[0] - expected[0]) / abs(expected[0])
        gradient = float((told[1] - expected[1]).norm() / expected[1].norm())
        found[way]["relative_difference"] = {"loss": loss, "gradient": gradient}
        if max(loss, gradient) > TOLERANCE:
            found[way] = {"failed": f"differs: loss by {loss:.1g}, gradient by {gradient:.1g}"}
    base = next((one["seconds"] for one in found.values() if "seconds" in one), None)
    for one in found.values():
        if base and "seconds" in one:
            one["times_as_fast"] = statistics.median(base) / statistics.median(one["seconds"])
    return {
        "benchmark": "gpu_step",
        "case": name,
        "shape": case,
        "theory": case.shape.theory(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "peak_tflops": peak_tflops,
        "ways": found,
    }


def _one(
    case: GpuCase,
    attention: str,
    door: Callable[[Any], nn.Module],
    batch: TokenBatch,
    rounds: int,
    device: str,
    peak_tflops: float | None,
) -> tuple[dict[str, Any], tuple[float, Tensor]]:
    """What it took, and loss and gradient of the small weights to compare it by."""
    step = Step(door(case.model(device, attention)), batch)
    loss = float(step())
    small = [p for p in step.policy.parameters() if p.grad is not None and p.numel() <= 1 << 20]
    gradient = torch.cat([p.grad.float().flatten() for p in small if p.grad is not None]).cpu()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    watch = stopwatch(device)
    seconds = [round(watch(step), 5) for _ in range(rounds)]
    middle = statistics.median(seconds)
    shape = case.shape
    tokens = sum(shape.prompt + length for length in shape.responses)
    work = shape.work()
    is_shared = getattr(step.policy, "layout", None) not in (None, "rows")
    if is_shared:
        multiplications = work.body + work.head
    else:
        is_original = isinstance(step.policy, OriginalStyle)
        multiplications = work.rows_body + (work.rows_head if is_original else work.head)
    flops = 3 * 2 * multiplications / middle
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    told = {
        "seconds": seconds,
        "tokens_per_second": round(tokens / middle),
        "tflops": round(flops / 1e12, 2),
        "mfu": round(flops / 1e12 / peak_tflops, 4) if peak_tflops else None,
        "peak_gib": None if peak is None else round(peak, 2),
    }
    return told, (loss, gradient)


def peak_of(name: str) -> float | None:
    """TFLOP/s of a card by its name; None where it is not known."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def table(result: dict[str, Any]) -> str:
    """For people."""
    found = [f"{result['case']}: {result['shape']} on {result['device']}"]
    for way, one in result["ways"].items():
        if "failed" in one:
            found.append(f"  {way:14} {one['failed']}")
            continue
        mfu = "" if one["mfu"] is None else f"   MFU {one['mfu']:.1%}"
        peak = "" if one["peak_gib"] is None else f"   {one['peak_gib']:.1f} GiB"
        found.append(
            f"  {way:14} {1000 * statistics.median(one['seconds']):8.1f} ms   "
            f"{one['tokens_per_second']:8,} tokens/s{mfu}{peak}   x {one['times_as_fast']:.2f}"
        )
    return "\n".join(found)
