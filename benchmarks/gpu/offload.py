"""PPO with `--offload_level` on: the same bits, less memory of the card.

Both runs go straight through, in the deterministic mode; what offloading may change is where
weights and moments wait, never a number.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.gpu import world
from benchmarks.gpu.setting import Setting, check, require_gpu
from benchmarks.gpu.training import COMMANDS, Process, differences

LEVELS = {
    "freeze_model": "freeze_model",
    "all": "freeze_model optimizer train_model",
}


def items(setting: Setting) -> list[str]:
    return list(LEVELS)


def run(item: str, setting: Setting) -> dict[str, Any]:
    require_gpu(setting)
    place = world.build(
        setting.folder("worlds") / "offload", *((32, 2) if setting.tiny else (1024, 8))
    )
    stage, flags = COMMANDS["ppo"]
    flags = {**flags, "num_rollouts": 2, "save_steps": 0}
    runs = setting.folder("runs/offload")
    plain, moved = runs / "plain", runs / item
    shutil.rmtree(moved, ignore_errors=True)
    straight = None
    if not (plain / "policy").is_dir():
        shutil.rmtree(plain, ignore_errors=True)
        straight = Process(stage, flags, place, plain)
        straight.finish()
    Process(stage, {**flags, "offload_level": LEVELS[item]}, place, moved).finish()
    differing = differences(plain, moved)
    peaks = {name: _peaks(folder) for name, folder in (("plain", plain), ("moved", moved))}
    less = {
        phase: round(peaks["plain"][phase] - peak)
        for phase, peak in peaks["moved"].items()
        if phase in peaks["plain"]
    }
    # What is off the card while responses are sampled must show there.
    saves = less.get("generate", 0) > 0
    line = "weights and metrics bit-equal" if not differing else f"differs: {differing[:3]}"
    line += f"; MiB less by phase: {less}"
    return check(not differing and saves, line, peaks=peaks, differing=differing)


def _peaks(run: Path) -> dict[str, float]:
    phases = json.loads((run / "manifest.json").read_text())["phases"]
    return {name: one["peak_mib"] for name, one in phases.items()}
