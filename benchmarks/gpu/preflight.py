"""What is installed here, how fast the card is, and what of the programme will be left out.

The peak that shares are told of comes from a list by the card's name, or from `--peak_tflops`; the
two figures measured here say how near to it a plain matrix product, and a copy, come.
"""

from __future__ import annotations

import shutil
import subprocess
from importlib import metadata
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu import parts
from benchmarks.gpu.setting import Setting
from benchmarks.gpu_step import peak_of
from benchmarks.harness import NotMeasured, stopwatch
from rrhf.models.forward import varlen_attention

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "peft",
    "flash-attn",
    "trl",
    "deepspeed",
    "matplotlib",
    "pytest",
)
NEEDED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "peft")


def items(setting: Setting) -> list[str]:
    return ["environment", "packages", "card", "left_out"]


def run(item: str, setting: Setting) -> dict[str, Any]:
    return {
        "environment": _environment,
        "packages": _packages,
        "card": _card,
        "left_out": _left_out,
    }[item](setting)


def peak_tflops(setting: Setting) -> float | None:
    """Dense bfloat16 peak of the card, where it is known."""
    if setting.peak_tflops is not None or not setting.on_gpu:
        return setting.peak_tflops
    return peak_of(torch.cuda.get_device_name())


def _environment(setting: Setting) -> dict[str, Any]:
    machine = harness.machine()
    facts: dict[str, Any] = {"device": machine["cpu"], "cuda": torch.version.cuda}
    line = f"{machine['cpu']}, {machine['cores']} cores; torch {torch.__version__}"
    if setting.on_gpu:
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "device": card.name,
            "capability": f"{card.major}.{card.minor}",
            "gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "driver": _driver(),
            "peak_tflops": peak_tflops(setting),
        }
        peak = facts["peak_tflops"]
        told = f"{peak:g} TFLOP/s" if peak else "unknown: give --peak_tflops for MFU"
        line = (
            f"{card.name}, {facts['gib']} GiB, sm_{card.major}{card.minor}, driver "
            f"{facts['driver']}; CUDA {torch.version.cuda}, torch {torch.__version__}; bf16 "
            f"{'yes' if facts['bf16'] else 'no'}; peak {told}"
        )
    return {"line": line, "facts": facts, "machine": machine}


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


def _packages(setting: Setting) -> dict[str, Any]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    there = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    missing = ", ".join(name for name, version in found.items() if not version)
    return {
        "passed": all(found[name] for name in NEEDED),
        "line": f"{there}; not installed: {missing or 'none'}",
        "packages": found,
        "torch_varlen": varlen_attention.torch_varlen_missing() or "yes",
    }


def _card(setting: Setting) -> dict[str, Any]:
    size = 512 if setting.tiny else 8192
    left = torch.randn(size, size, device=setting.device, dtype=torch.bfloat16)
    watch = stopwatch(setting.device)

    def best(call: Any) -> float:
        call()
        return max(min(watch(call) for _ in range(5)), 1e-9)

    tflops = 2 * size**3 / best(lambda: left @ left) / 1e12
    room = torch.empty(2**20 if setting.tiny else 2**31, dtype=torch.uint8, device=setting.device)
    other = torch.empty_like(room)
    gigabytes = 2 * room.numel() / best(lambda: other.copy_(room)) / 1e9
    return {
        "line": f"bfloat16 product of {size} cubed: {tflops:.1f} TFLOP/s; copy: "
        f"{gigabytes:.0f} GB/s read and written",
        "tflops": round(tflops, 2),
        "gigabytes_per_second": round(gigabytes, 1),
    }


def _left_out(setting: Setting) -> dict[str, Any]:
    """Asks every other part for what it will not do here."""
    found: dict[str, dict[str, list[str]]] = {}
    for part in parts.PARTS:
        module = parts.load(part)
        if not hasattr(module, "require"):
            continue
        for item in module.items(setting):
            try:
                module.require(item, setting)
            except NotMeasured as reason:
                found.setdefault(str(reason), {}).setdefault(part, []).append(item)

    def named(part: str, items: list[str]) -> str:
        return f"{part} ({', '.join(items) if len(items) < 4 else f'{len(items)} items'})"

    told = [
        f"{', '.join(named(part, items) for part, items in of_reason.items())}: {reason}"
        for reason, of_reason in found.items()
    ]
    return {"line": "; ".join(told) or "nothing", "left_out": found}
