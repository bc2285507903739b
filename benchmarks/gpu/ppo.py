"""One iteration of PPO at 1B: rollout, scores, reference, values, and the steps of its epochs.

`rrhf train ppo` as it stands, in a process that is stopped between two iterations, with the engine
that users get, with padded rows, through torch's varlen attention, and on a trunk that policy and
critic share; TRL 1.10, where an environment holds it, does the same work by its own trainer. Wall
clock, the GPU waited for. Tokens count as a user has them, every response with its prompt; *MFU*
counts the multiplications that the way needs (`ppo_iteration.Case`), recomputation left out.
"""

from __future__ import annotations

import gc
import json
import shutil
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import ppo_iteration
from benchmarks.gpu.preflight import peak_tflops
from benchmarks.gpu.setting import Setting, check, require_gpu
from benchmarks.ppo_iteration import PEER_PYTHON, Case, write_world
from benchmarks.workers import Worker

ROUNDS = 2
SIZES = Case(
    "separate",
    samples=4,
    hidden=2048,
    layers=16,
    vocabulary=128256,
    prompt=512,
    response=128,
    rows=32,
    epochs=2,
    heads=32,
    key_heads=8,
    mlp=8192,
    micro_rows=8,
    device="cuda",
)
TINY = Case("separate", 2, 32, 2, 96, 9, 6, 4, 2, heads=4, key_heads=2, micro_rows=2)

WAYS: dict[str, dict[str, Any]] = {
    "rrhf": {},
    "rrhf_padded": {"layout": "padded"},
    "rrhf_varlen": {"layout": "varlen_attention"},
    "rrhf_shared_trunk": {"critic": "shared trunk"},
    "trl": {},
}


def items(setting: Setting) -> list[str]:
    return list(WAYS)


def require(item: str, setting: Setting) -> None:
    """Raises NotMeasured where a kernel or the peer is missing."""
    if item == "rrhf_varlen":
        require_gpu(setting)
    if item == "trl":
        ppo_iteration._require_peer(setting.trl_python or str(PEER_PYTHON))


def run(item: str, setting: Setting) -> dict[str, Any]:
    require(item, setting)
    base = TINY if setting.tiny else SIZES
    sizes = replace(base, device=setting.device, **WAYS[item])
    world = setting.folder("ppo")
    if not (world / "prompts.jsonl").exists():
        write_world(world, sizes)
        gc.collect()
        if setting.on_gpu:
            torch.cuda.empty_cache()
    python = (setting.trl_python or str(PEER_PYTHON)) if item == "trl" else sys.executable
    module = "benchmarks.ppo_trl" if item == "trl" else "benchmarks.ppo_rrhf"
    command = [python, "-m", module, str(_own_run(world, item)), json.dumps(asdict(sizes))]
    try:
        with Worker(command) as worker:
            pieces = [worker.piece() for _ in range(1 + (1 if setting.tiny else ROUNDS))]
    except RuntimeError as error:
        if "OutOfMemoryError" in str(error) or "CUDA out of memory" in str(error):
            return {"line": f"out of memory; {sizes}"}
        raise
    return _told(item, sizes, pieces, peak_tflops(setting))


def _own_run(world: Path, item: str) -> Path:
    """A world for one way, whose run folder no other way has written to; models are links."""
    place = world / item
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name in ("policy", "reward", "prompts.jsonl"):
        (place / name).symlink_to(world / name)
    return place


def _told(
    item: str, sizes: Case, pieces: list[dict[str, Any]], peak: float | None
) -> dict[str, Any]:
    seconds = [piece["seconds"] for piece in pieces[1:]]
    middle = statistics.median(seconds)
    theirs, ours = sizes.multiplications()
    # Padded rows compute every prompt for every response of it, as the peer does.
    alone = replace(sizes, samples=1).multiplications()[1]
    each = {"trl": theirs, "rrhf_padded": alone}.get(item, ours)
    tflops = 2 * sizes.rows * each / middle / 1e12
    tokens = round(sizes.rows * (sizes.prompt + sizes.response) / middle)
    phases = pieces[-1].get("phases", {})
    peaks = [value / 1024 for name, value in phases.items() if name.startswith("peak_mib_")]
    gib = max(peaks, default=pieces[-1].get("peak_gib"))
    first = pieces[0]
    # The policy is the reference, and the step begins at the policy that sampled.
    bound = 1e-3 if sizes.device == "cpu" else 2e-2
    sound = abs(first["ratio"] - 1) < bound and abs(first["kl"]) < bound * sizes.response
    sound &= first.get("shortest_response", sizes.response) == sizes.response
    share = "" if peak is None else f", MFU {tflops / peak:.1%}"
    memory = "" if gib is None else f", {gib:.1f} GiB"
    line = f"{middle:.2f} s, {tokens:,} tokens/s{share}{memory}; {sizes}"
    line += "" if sound else f"; not the same work: {first}"
    return check(
        sound,
        line,
        round_seconds=seconds,
        tokens_per_second=tokens,
        tflops=round(tflops, 3),
        mfu=None if peak is None else round(tflops / peak, 4),
        peak_gib=gib,
        phases=phases,
        first=first,
    )
