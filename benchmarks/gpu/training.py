"""One training of each paradigm through its command: killed, resumed, and no bit is different.

Three processes an item: one goes straight through, one is ended by SIGKILL before an optimiser
step, the third is the same command with `--resume_from_checkpoint`. All run in torch's
deterministic mode (`killable`), in bfloat16, with a checkpoint every other step. Models that are
left must be equal byte by byte, and so must all metrics but times, rates and memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu import killable, world
from benchmarks.gpu.setting import Setting, check, require_gpu, require_package
from benchmarks.harness import ROOT

KILLED_AT = 6
"""Optimiser step; a checkpoint follows every second one, so at least one step is done again."""

COMMON = {"bf16": "", "save_steps": 2, "logging_steps": 1, "model_max_length": 200, "seed": 3}
OFFLINE = {"per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-4}
ONLINE = {"num_return_sequences": 2, "max_new_tokens": 12, "learning_rate": 1e-5}

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"data_path": "ranked.jsonl", **OFFLINE}),
    "reward": ("reward", {"data_path": "pairs.jsonl", **OFFLINE}),
    "rank": ("rank", {"data_path": "ranked.jsonl", **OFFLINE}),
    "ppo": (
        "ppo",
        {
            "train_datasets": "prompts.jsonl",
            "reward_model_name_or_path": "reward",
            "rollout_size": 16,
            "num_rollouts": 4,
            "ppo_epochs": 2,
            "per_device_train_batch_size": 8,
            "per_device_prompt_batch_size": 8,
            "gradient_accumulation_steps": 2,
            **ONLINE,
        },
    ),
    "iterative": (
        "iterative",
        {
            "train_datasets": "prompts.jsonl",
            "reward_model_name_or_path": "reward",
            "num_rounds": 2,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "per_device_prompt_batch_size": 16,
            "num_train_epochs": 1,
            **ONLINE,
        },
    ),
}
ENGINES = {
    "rank_varlen": ("rank", {"layout": "varlen_attention"}),
    "rank_flash": ("rank", {"attn_implementation": "flash_attention_2"}),
    "rank_checkpointing": ("rank", {"gradient_checkpointing": ""}),
}
"""The same once more, where another kernel or recomputation must keep the order of its sums."""

NOT_COMPARED = ("seconds", "peak", "per_second", "time", "memory", "left", "eta")


def items(setting: Setting) -> list[str]:
    return [*COMMANDS, *ENGINES]


def require(item: str, setting: Setting) -> None:
    """Raises NotMeasured where a kernel is missing."""
    if item in ("rank_varlen", "rank_flash"):
        require_gpu(setting)
    if item == "rank_flash":
        require_package("flash_attn", "flash_attention_2")


def run(item: str, setting: Setting) -> dict[str, Any]:
    require(item, setting)
    small = (32, 2) if setting.tiny else (512, 4)
    place = world.build(setting.folder("worlds") / "small", *small)
    base, changes = ENGINES.get(item, (item, {}))
    stage, flags = COMMANDS[base]
    runs = setting.folder(f"runs/{item}")
    shutil.rmtree(runs)
    straight, cut = Process(stage, {**flags, **changes}, place, runs / "straight"), None
    try:
        cut = Process(stage, {**flags, **changes}, place, runs / "cut", KILLED_AT)
        steps = straight.finish()
        killed = cut.wait()
        assert killed == -signal.SIGKILL, f"was not killed at step {KILLED_AT}: exit code {killed}"
        resumed = Process(stage, {**flags, **changes}, place, runs / "cut", resume=True).finish()
    finally:
        for process in filter(None, (straight, cut)):
            process.end()
    differing = differences(runs / "straight", runs / "cut")
    repeated = KILLED_AT - 1 + resumed - steps
    passed = not differing and resumed < steps
    line = f"killed at step {KILLED_AT} of {steps}, resumed with {repeated} done again: "
    line += "weights and metrics bit-equal" if not differing else f"differs: {differing[:3]}"
    if resumed >= steps:
        line = f"began anew after the kill: {resumed} of {steps} steps"
    result = check(passed, line, steps=steps, resumed_steps=resumed, differing=differing)
    if passed:
        shutil.rmtree(runs)
    return result


class Process:
    """A command of `rrhf train` in the deterministic mode.

    Args:
        stage: of `rrhf train`.
        flags: name -> value; "" = a flag without one. Files of the world are named by themselves.
        place: the world.
        output: run folder.
        kill_at: optimiser step; 0 = never.
        resume: with `--resume_from_checkpoint`.
    """

    def __init__(
        self,
        stage: str,
        flags: dict[str, Any],
        place: Path,
        output: Path,
        kill_at: int = 0,
        resume: bool = False,
    ) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self._count = output.with_name(f"{output.name}.count")
        self._log = output.with_name(f"{output.name}.log")
        command = [sys.executable, "-m", "benchmarks.gpu.killable", str(kill_at), str(self._count)]
        command += ["train", stage, "--model_name_or_path", str(place / "model")]
        command += ["--output_dir", str(output)]
        for name, value in {**COMMON, **flags}.items():
            here = place / str(value)
            text = str(here) if value != "" and here.exists() else str(value)
            command += [f"--{name}", *([text] if text else [])]
        command += ["--resume_from_checkpoint"] if resume else []
        with open(self._log, "a") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, **killable.ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait(self) -> int:
        """The exit code, negative where a signal ended it."""
        return self._process.wait()

    def finish(self) -> int:
        """How many optimiser steps it took.

        Raises:
            RuntimeError: it failed; the text holds its last words.
        """
        if code := self.wait():
            raise RuntimeError(f"exit code {code}: {self._log.read_text()[-1500:]}")
        return int(json.loads(self._count.read_text())["steps"])

    def end(self) -> None:
        """It is not needed any more."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def differences(left: Path, right: Path) -> list[str]:
    """What two run folders do not have in common: weights byte by byte, metrics but for times."""
    found = []
    weights = [
        {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.safetensors"))
            if "checkpoints" not in path.parts
        }
        for folder in (left, right)
    ]
    assert weights[0], f"{left}: no weights"
    for name in sorted({*weights[0], *weights[1]}):
        if weights[0].get(name) != weights[1].get(name):
            found.append(name)
    for path in sorted(left.rglob("metrics.jsonl")):
        name = path.relative_to(left)
        rows = [_metrics(folder / name) for folder in (left, right)]
        if rows[0] != rows[1]:
            found.append(str(name))
    return found


def _metrics(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return [
        {k: v for k, v in row.items() if not any(word in k for word in NOT_COMPARED)}
        for row in rows
    ]
