"""One iteration of TRL's PPO at a time: `python -m benchmarks.ppo_trl WORLD SIZES`, at a gate.

Runs in an environment that holds trl 1.10.0, and needs nothing of ours there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.workers import Gate


def main(world: Path, sizes: dict[str, Any], gate: Gate) -> None:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    on_gpu, micro = sizes["device"] == "cuda", sizes["micro_rows"] or sizes["rows"]

    def wall_clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    if on_gpu:
        gate.clock = wall_clock
    else:
        torch.set_num_threads(1)

    class AtTheGate(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            gate()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            told = state.log_history[-1]
            counted = next(iter(trainer.optimizer.state.values()))["step"]
            gate(
                optimizer_steps=int(counted),
                kl=told["objective/kl"],
                ratio=told["val/ratio"],
                entropy=told["policy/entropy_avg"],
                peak_gib=torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            )

    frozen = torch.bfloat16 if on_gpu else torch.float32

    def scorer(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            world / "reward", num_labels=1, dtype=dtype
        )

    def policy(dtype: torch.dtype = torch.float32) -> Any:
        return AutoModelForCausalLM.from_pretrained(world / "policy", dtype=dtype)

    rows = [json.loads(line)["ids"] for line in (world / "prompts.jsonl").open()]
    prompts = Dataset.from_dict({"input_ids": rows})
    tokenizer = AutoTokenizer.from_pretrained(world / "policy", padding_side="left")
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(world / "trl"),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=sizes["rows"] // micro,
            num_mini_batches=1,
            num_ppo_epochs=sizes["epochs"],
            response_length=sizes["response"],
            temperature=1.0,
            learning_rate=sizes["learning_rate"],
            lr_scheduler_type="constant",
            stop_token=None,
            num_sample_generations=0,
            total_episodes=10**6,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not on_gpu,
            bf16=on_gpu,
            gradient_checkpointing=False,
        ),
        processing_class=tokenizer,
        model=policy(),
        ref_model=policy(frozen),
        reward_model=scorer(frozen),
        value_model=scorer(),
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[AtTheGate()],
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Gate())
