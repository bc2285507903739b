"""`gpu_step` case by case and way by way: tokens/s, MFU and memory of a training step.

What loss and gradient have to be is computed first, untimed, by padded rows.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from benchmarks import gpu_step, trl_peer
from benchmarks.gpu.preflight import peak_tflops
from benchmarks.gpu.setting import Setting, require_gpu, require_package
from benchmarks.gpu_step import CASES, WAYS, GpuCase
from benchmarks.harness import NotMeasured
from benchmarks.shapes import Shape

ROUNDS = 5
ORDER = ("1B", "7B_checkpointed", "1B_short", "1B_checkpointed", "7B")
"""What is wanted most comes first, in case the time does not suffice."""
REFERENCES = ("padded_sdpa", "shared_sdpa")
"""Say what a step must compute: the first for which memory suffices."""

TINY = GpuCase(Shape(32, 2, 96, 9, (5, 3, 6, 5)), dtype="float32")
_expected: dict[str, gpu_step.Told | None] = {}


def cases(setting: Setting) -> dict[str, GpuCase]:
    if setting.tiny:
        return {"tiny": TINY}
    return {name: CASES[name] for name in ORDER}


def items(setting: Setting) -> list[str]:
    return [f"{case} {way}" for case in cases(setting) for way in WAYS]


def require(item: str, setting: Setting) -> None:
    """Raises NotMeasured where a kernel or a package is missing."""
    _, way = item.split()
    if way.endswith(("_flash", "_varlen", "_flex")):
        require_gpu(setting)
    if way.endswith("_flash"):
        require_package("flash_attn", "flash_attention_2")
    if way == "padded_trl":
        try:
            trl_peer.load(setting.trl_path)
        except NotMeasured:
            raise
        except Exception as error:  # whatever another version of it makes of what is installed
            raise NotMeasured(f"TRL cannot be imported here: {error}"[:300]) from error


def run(item: str, setting: Setting) -> dict[str, Any]:
    require(item, setting)
    name, way = item.split()
    case = cases(setting)[name]
    gpu_step.PEER_FOLDER = setting.trl_path
    if name not in _expected:
        _expected[name] = _reference(case, setting)
    peak = peak_tflops(setting)
    tolerance = 1e-4 if case.dtype == "float32" else gpu_step.TOLERANCE
    rounds = 1 if setting.tiny else ROUNDS
    found, _ = gpu_step.measured_way(
        case, way, rounds, setting.device, peak, _expected[name], tolerance
    )
    common = {"case": name, "way": way, "sizes": str(case), "numbers": found}
    if "failed" in found:
        # A card that is too small for a way is a result; anything else is a fault.
        return {"passed": found["failed"] == "out of memory", "line": found["failed"], **common}
    return {"passed": True, "line": line(found), **common}


def _reference(case: GpuCase, setting: Setting) -> gpu_step.Told | None:
    for way in REFERENCES:
        try:
            return gpu_step.computed(case, way, setting.device)
        except torch.OutOfMemoryError:
            pass
        gc.collect()  # what the failure held
        torch.cuda.empty_cache()
    return None  # no way fits, so none will be compared


def line(found: dict[str, Any]) -> str:
    """Speed, share of the peak, memory."""
    mfu = "" if found["mfu"] is None else f", MFU {found['mfu']:.1%}"
    peak = "" if found["peak_gib"] is None else f", {found['peak_gib']:.1f} GiB"
    seconds = sorted(found["seconds"])[len(found["seconds"]) // 2]
    return f"{1000 * seconds:.1f} ms, {found['tokens_per_second']:,} tokens/s{mfu}{peak}"
