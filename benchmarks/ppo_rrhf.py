"""One iteration of `rrhf train ppo` at a time: `python -m benchmarks.ppo_rrhf WORLD SIZES`.

It is the trainer as it stands, stopped before each rollout: what is timed holds its logging, its
tables and its checks too.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.workers import Gate
from rrhf.training.online import ppo
from rrhf.training.online.rollout import Rollout, RolloutWriter

CRITICS: dict[str, dict[str, Any]] = {
    "separate": {},
    "shared trunk": {"share_trunk": True},
    "LoRA": {"share_trunk": True, "use_lora": True, "lora_r": 16},
}
"""What the kinds of critic are called on the command line."""


def config(world: Path, sizes: dict[str, Any]) -> ppo.PPOConfig:
    """As the peer is set up; what is not named here is the default."""
    rows, samples = sizes["rows"], sizes["samples"]
    return ppo.PPOConfig(
        str(world / "policy"),
        str(world / "run"),
        train_datasets=str(world / "prompts.jsonl"),
        reward_model_name_or_path=str(world / "reward"),
        rollout_size=rows,
        num_return_sequences=samples,
        per_device_prompt_batch_size=rows // samples,
        per_device_train_batch_size=sizes["micro_rows"] or rows,
        gradient_accumulation_steps=rows // (sizes["micro_rows"] or rows),
        num_rollouts=10**6,
        ppo_epochs=sizes["epochs"],
        max_new_tokens=sizes["response"],
        min_new_tokens=sizes["response"],
        model_max_length=sizes["prompt"] + sizes["response"],
        learning_rate=sizes["learning_rate"],
        critic_learning_rate=sizes["learning_rate"],
        lr_scheduler_type="constant",
        critic_lr_scheduler_type="constant",
        chat_format="raw",
        save_steps=0,
        layout=sizes["layout"],
        bf16=sizes["device"] == "cuda",
        **CRITICS[sizes["critic"]],
    )


def main(world: Path, sizes: dict[str, Any], gate: Gate) -> None:
    if sizes["device"] == "cuda":
        gate.clock = wall_clock
    else:
        torch.set_num_threads(1)
    settings = config(world, sizes)
    write = RolloutWriter.write

    def stopped_write(self: RolloutWriter, *args: Any, **kwargs: Any) -> Rollout:
        gate(**_facts(Path(settings.output_dir) / "metrics.jsonl"))
        return write(self, *args, **kwargs)

    RolloutWriter.write = stopped_write  # type: ignore[method-assign]
    ppo.train(settings)


def wall_clock() -> float:
    """Seconds, when the GPU has done what it was told."""
    torch.cuda.synchronize()
    return time.perf_counter()


def _facts(metrics: Path) -> dict[str, Any]:
    if not metrics.exists() or not (lines := metrics.read_text().splitlines()):
        return {}
    rows = [json.loads(line) for line in lines]
    rollout = [row for row in rows if "score" in row][-1]
    steps = [row for row in rows if "loss" in row]
    mine = [row for row in steps if row["rollout"] == rollout["rollout"]]
    return {
        "optimizer_steps": len(steps),
        "kl": rollout["kl"],
        "ratio": sum(row["ratio"] for row in mine) / len(mine),
        "first_ratio": mine[0]["largest_ratio"],
        "entropy": sum(row["entropy"] for row in mine) / len(mine),
        "shortest_response": rollout["response_length_min"],
        "phases": {
            k: v
            for row in (rollout, mine[-1])
            for k, v in row.items()
            if k.startswith(("seconds_", "peak_mib_"))
        },
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Gate())
