"""A training step of a 1B- and a 7B-shaped Llama on one GPU: tokens/s, share of peak, memory.

bfloat16 weights of random values, forward and backward without an optimizer, CUDA events, each way
with a model of its own that is given back before the next. `padded_trl` is the fused head of TRL
1.16 on padded rows, where that TRL is installed. Tokens are counted as a user has them,
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

from benchmarks import trl_peer
from benchmarks.harness import NotMeasured, stopwatch
from benchmarks.original_step import OriginalStyle
from benchmarks.rrhf_step import Step
from benchmarks.shapes import Shape
from rrhf.data.collate import TokenBatch
from rrhf.errors import UserError
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.loading import check_attention, enable_checkpointing

TABLE = "gpu"
TOLERANCE = 0.1
"""Of loss and gradient, relatively, between two ways in bfloat16 over many layers."""
SETTINGS = {"peak_tflops": "dense bfloat16 peak of the card in TFLOP/s, where it is not known here"}

PEER_FOLDER: str | None = None
"""Where TRL 1.16 lies; None = where `trl_peer` looks for it."""

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
_SHORT = Shape(2048, 16, 128256, 192, (64,) * 4, heads=32, key_heads=8, mlp=8192)
_7B = Shape(4096, 32, 32000, 1024, (256,) * 4, heads=32, key_heads=32, mlp=11008)

CASES = {
    "1B": GpuCase(_1B),
    "1B_checkpointed": GpuCase(_1B, checkpointing=True),
    "1B_short": GpuCase(_SHORT),
    "7B": GpuCase(_7B),
    "7B_checkpointed": GpuCase(_7B, checkpointing=True),
}
"""`1B_short` has HH's lengths: there a kernel's start-up is much of its time."""

GOALS: dict[str, float] = {}

WAYS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "original": ("sdpa", OriginalStyle),
    "padded_sdpa": ("sdpa", lambda model: FastPolicy(model, "rows")),
    "padded_flash": ("flash_attention_2", lambda model: FastPolicy(model, "rows")),
    "padded_trl": ("sdpa", lambda model: trl_peer.FusedHeadRows(model, PEER_FOLDER)),
    "shared_sdpa": ("sdpa", lambda model: build_policy(model, "shared_prefix")),
    "shared_varlen": ("sdpa", lambda model: build_policy(model, "varlen_attention")),
    "shared_flash": ("flash_attention_2", lambda model: build_policy(model, "shared_prefix")),
    "shared_flex": ("sdpa", lambda model: build_policy(model, "flex_attention")),
}
"""Attention of the model, and the forward interface in front of it."""


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
    found: dict[str, dict[str, Any]] = {}
    expected: Told | None = None
    for way in WAYS:
        found[way], told = measured_way(case, way, rounds, device, peak_tflops, expected)
        expected = expected or told
    return result_of(name, case, found, device, peak_tflops)


def result_of(
    name: str,
    case: GpuCase,
    ways: dict[str, dict[str, Any]],
    device: str,
    peak_tflops: float | None,
) -> dict[str, Any]:
    """The result of a case from what its ways gave; the first that was timed is the baseline."""
    add_ratios(ways)
    return {
        "benchmark": "gpu_step",
        "case": name,
        "shape": case,
        "theory": case.shape.theory(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "peak_tflops": peak_tflops,
        "ways": ways,
    }


def add_ratios(ways: dict[str, dict[str, Any]]) -> None:
    """How many times as fast each way is as the first that was timed."""
    base = next((one["seconds"] for one in ways.values() if "seconds" in one), None)
    for one in ways.values():
        if base and "seconds" in one:
            one["times_as_fast"] = statistics.median(base) / statistics.median(one["seconds"])


Told = tuple[float, Tensor]
"""Loss, and the gradient of the small weights."""


def measured_way(
    case: GpuCase,
    way: str,
    rounds: int,
    device: str,
    peak_tflops: float | None,
    expected: Told | None,
    tolerance: float = TOLERANCE,
) -> tuple[dict[str, Any], Told | None]:
    """What one way took, or why it failed; and what it computed.

    Args:
        case: sizes.
        way: a key of `WAYS`.
        rounds: that are timed.
        device, peak_tflops: as in `measured`.
        expected: what another way computed; None = compare with nothing.
        tolerance: how far loss and gradient may be from that, relatively.
    """
    attention, door = WAYS[way]
    scores = [float(number) for number in range(len(case.shape.responses))]
    batch = case.shape.batch(scores).to(device)
    try:
        check_attention(attention)
        found, told = _one(case, attention, door, batch, rounds, device, peak_tflops)
    except torch.OutOfMemoryError:
        return {"failed": "out of memory"}, None
    except (UserError, ImportError, NotImplementedError, NotMeasured) as error:
        return {"failed": str(error)}, None
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    against = expected or told
    loss = abs(told[0] - against[0]) / abs(against[0])
    gradient = float((told[1] - against[1]).norm() / against[1].norm())
    found["relative_difference"] = {"loss": loss, "gradient": gradient}
    if max(loss, gradient) > tolerance:
        differs = f"differs: loss by {loss:.1g}, gradient by {gradient:.1g}"
        return {"failed": differs, "would_have_been": found}, told
    return found, told


def computed(case: GpuCase, way: str, device: str) -> Told:
    """What a way computes, without timing it."""
    attention, door = WAYS[way]
    scores = [float(number) for number in range(len(case.shape.responses))]
    try:
        step = Step(door(case.model(device, attention)), case.shape.batch(scores).to(device))
        return float(step()), _small_gradient(step)
    finally:
        step = None  # type: ignore[assignment]
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _small_gradient(step: Step) -> Tensor:
    small = [p for p in step.policy.parameters() if p.grad is not None and p.numel() <= 1 << 20]
    return torch.cat([p.grad.float().flatten() for p in small if p.grad is not None]).cpu()


def _one(
    case: GpuCase,
    attention: str,
    door: Callable[[Any], nn.Module],
    batch: TokenBatch,
    rounds: int,
    device: str,
    peak_tflops: float | None,
) -> tuple[dict[str, Any], Told]:
    """What it took, and loss and gradient of the small weights to compare it by."""
    step = Step(door(case.model(device, attention)), batch)
    loss = float(step())
    gradient = _small_gradient(step)
    if device == "cuda":
        step()  # kernels that are compiled or chosen on their first call are ready now
        torch.cuda.reset_peak_memory_stats()
    watch = stopwatch(device)
    seconds = [round(watch(step), 5) for _ in range(rounds)]
    middle = statistics.median(seconds)
    shape = case.shape
    tokens = sum(shape.prompt + length for length in shape.responses)
    flops = 3 * 2 * _multiplications(step.policy, shape) / middle
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    told = {
        "seconds": seconds,
        "tokens_per_second": round(tokens / middle),
        "tflops": round(flops / 1e12, 2),
        "mfu": round(flops / 1e12 / peak_tflops, 4) if peak_tflops else None,
        "peak_gib": None if peak is None else round(peak, 2),
    }
    return told, (loss, gradient)


def _multiplications(policy: nn.Module, shape: Shape) -> float:
    """Of a forward pass, recomputation left out."""
    work = shape.work()
    if getattr(policy, "layout", None) not in (None, "rows"):
        return work.body + work.head
    if isinstance(policy, OriginalStyle):
        return work.rows_body + work.rows_head
    return work.rows_body + work.head


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
