"""What each rank does under each launch: trainings whose outcome the tests compare."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ppo_cases import settings
from safetensors.torch import load_file
from step_cases import stopped_after
from torch import nn
from torch.distributed.tensor import DTensor

from rrhf.errors import StoppedBySignal
from rrhf.generation.local.engine import LocalEngine
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.update import NonFiniteError, Term
from rrhf.training.methods import rank, sft
from rrhf.training.online import ppo

prepared: list[dict[str, Any]] = []
"""What became of each trainable root."""

roots: list[Parallel] = []
"""Who has prepared them."""


def do(place: int, launch: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case that is asked for; returns what became of the roots."""
    torch.set_num_threads(1)
    watch_preparation()
    accumulation = 2 if launch == "one" else 1  # the same global batch
    for case in arguments["cases"]:
        globals()[case](place, Path(arguments["world"]), Path(arguments["out"]), accumulation)
    return prepared


def watch_preparation() -> None:
    plain = Parallel.prepare

    def prepare(self: Parallel, model: nn.Module, *rest: Any) -> Any:
        root, optimizer = plain(self, model, *rest)
        weights = list(root.parameters())
        roots.append(self)
        prepared.append(
            {
                "kind": self.kind,
                "class": type(root).__name__,
                "cut": sum(isinstance(w, DTensor) for w in weights) / len(weights),
                "layouts": sorted({m.layout for m in root.modules() if hasattr(m, "layout")}),
                "stage": getattr(root, "zero_optimization_stage", lambda: None)(),
                "mine": sum(
                    (w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights
                ),
            }
        )
        return root, optimizer

    Parallel.prepare = prepare  # type: ignore[method-assign]


def rank_config(world: Path, out: Path, accumulation: int, **changes: Any) -> rank.RankConfig:
    values: dict[str, Any] = {
        "data_path": str(world / "ranked.jsonl"),
        "eval_data_path": str(world / "ranked.jsonl"),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,
        "model_max_length": 100,
        "save_steps": 0,
        **changes,
    }
    return rank.RankConfig(str(world / "model"), str(out), **values)


def ranking(place: int, world: Path, out: Path, accumulation: int) -> None:
    rank.train(rank_config(world, out / "ranking", accumulation))


def dpo(place: int, world: Path, out: Path, accumulation: int) -> None:
    rank.train(rank_config(world, out / "dpo", accumulation, objective="dpo"))


def kto(place: int, world: Path, out: Path, accumulation: int) -> None:
    rank.train(rank_config(world, out / "kto", accumulation, objective="kto"))


def dpo_adapters(place: int, world: Path, out: Path, accumulation: int) -> None:
    changes = {"objective": "dpo", "use_lora": True, "lora_r": 4}
    rank.train(rank_config(world, out / "dpo_adapters", accumulation, **changes))


def ranking_by_tokens(place: int, world: Path, out: Path, accumulation: int) -> None:
    changes: dict[str, Any] = {"max_tokens_per_batch": 100, "layout": "shared_prefix"}
    rank.train(rank_config(world, out / "ranking_by_tokens", accumulation, **changes))


def ranking_recomputed(place: int, world: Path, out: Path, accumulation: int) -> None:
    """One prompt a forward: the second rank ends with a filler, of which nothing is kept."""
    changes = {"per_device_train_batch_size": 1, "gradient_checkpointing": True}
    folder = out / "ranking_recomputed"
    rank.train(rank_config(world, folder, 2 * accumulation, **changes))


def demonstrations(place: int, world: Path, out: Path, accumulation: int) -> None:
    """Label smoothing, whose means have gradients too; the second rank ends with a filler."""
    sft.train(
        sft.SFTConfig(
            str(world / "model"),
            str(out / "demonstrations"),
            data_path=str(world / "ranked.jsonl"),
            label_smoothing=0.1,
            gradient_accumulation_steps=4 * accumulation,
            learning_rate=1e-3,
            adam_epsilon=1e-3,
            model_max_length=100,
            save_steps=0,
        )
    )


def ranking_resumed(place: int, world: Path, out: Path, accumulation: int) -> None:
    folder = out / "ranking_resumed"
    with stopped_after(2), suppress(StoppedBySignal):
        rank.train(rank_config(world, folder, accumulation))
    rank.train(rank_config(world, folder, accumulation, resume_from_checkpoint=True))


def ranking_in_bfloat16(place: int, world: Path, out: Path, accumulation: int) -> None:
    rank.train(rank_config(world, out / "ranking_in_bfloat16", accumulation, bf16=True))


def infinite_gradient(place: int, world: Path, out: Path, accumulation: int) -> None:
    """A finite loss whose gradient is not, on one rank; notes whether the weights have moved."""
    plain = rank.RankObjective.__call__

    def broken(self: rank.RankObjective, outputs: Any, batch: Any) -> dict[str, Term]:
        terms = plain(self, outputs, batch)
        if place == 1:
            nothing = (0 * outputs.logprobs).sum().sqrt()  # its slope at zero is infinite
            terms["rank"] = replace(terms["rank"], total=terms["rank"].total + nothing)
        return terms

    rank.RankObjective.__call__ = broken  # type: ignore[method-assign]
    try:
        rank.train(rank_config(world, out / "infinite_gradient", accumulation))
    except NonFiniteError:
        parallel = roots[-1]
        start = load_file(world / "model" / "model.safetensors")
        weights = parallel.whole_weights(parallel.unwrap(parallel._root))
        moved = [
            name for name, w in weights if not torch.equal(w, start[name.removeprefix("model.")])
        ]
        prepared[-1]["moved"] = moved
    finally:
        rank.RankObjective.__call__ = plain  # type: ignore[method-assign]


def ppo_config(world: Path, out: Path, accumulation: int, **changes: Any) -> ppo.PPOConfig:
    values: dict[str, Any] = {
        "gradient_accumulation_steps": accumulation,
        "rollout_size": 11,
        "ppo_epochs": 1,
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        **changes,
    }
    return settings(world, out, **values)


def with_critic(place: int, world: Path, out: Path, accumulation: int) -> None:
    ppo.train(ppo_config(world, out / "with_critic", accumulation))


def warm_up(place: int, world: Path, out: Path, accumulation: int) -> None:
    """The policy waits for its critic: neither its log-probs nor its entropy have a gradient."""
    changes = {"entropy_coeff": 0.01, "critic_warmup_steps": 1, "num_rollouts": 1}
    ppo.train(ppo_config(world, out / "warm_up", accumulation, **changes))


def with_critic_by_tokens(place: int, world: Path, out: Path, accumulation: int) -> None:
    changes = {"max_tokens_per_batch": 100}
    ppo.train(ppo_config(world, out / "with_critic_by_tokens", accumulation, **changes))


def with_critic_resumed(place: int, world: Path, out: Path, accumulation: int) -> None:
    folder = out / "with_critic_resumed"
    with stopped_after(3), suppress(StoppedBySignal):
        ppo.train(ppo_config(world, folder, accumulation))
    ppo.train(ppo_config(world, folder, accumulation, resume_from_checkpoint=True))


def everything(place: int, world: Path, out: Path, accumulation: int) -> None:
    """One trunk, demonstrations, a moving average, an evaluation."""
    ppo.train(
        ppo_config(
            world,
            out / "everything",
            accumulation,
            share_trunk=True,
            use_ema=True,
            ema_beta=0.5,
            ptx_datasets=str(world / "ranked.jsonl"),
            ptx_coeff=0.5,
            eval_datasets=str(world / "prompts.jsonl"),
            num_rollouts=1,
        )
    )


def adapters(place: int, world: Path, out: Path, accumulation: int) -> None:
    ppo.train(ppo_config(world, out / "adapters", accumulation, use_lora=True, lora_r=2))


def online_ranking(place: int, world: Path, out: Path, accumulation: int) -> None:
    ppo.train(
        ppo_config(
            world,
            out / "online_ranking",
            accumulation,
            method="rrhf",
            num_return_sequences=3,
            rollout_size=15,
            per_device_train_batch_size=2,
            num_rollouts=1,
        )
    )


def early_end(place: int, world: Path, out: Path, accumulation: int) -> None:
    """The second rank writes one token where the first writes six, and then nothing at all."""
    generate = LocalEngine.generate
    rollouts = iter(range(2))

    def short(self: LocalEngine, prompts: Any, params: Any) -> Any:
        written = generate(self, prompts[: 1 if place else None], params)
        if not place:
            return written
        count = 1 - next(rollouts)
        ((_, (sample, *_)),) = written
        cut = replace(sample, token_ids=sample.token_ids[:count], logprobs=sample.logprobs[:count])
        return ((place, [cut]) for place in range(len(prompts)))

    LocalEngine.generate = short  # type: ignore[method-assign]
    try:
        ppo.train(ppo_config(world, out / "early_end", accumulation))
    finally:
        LocalEngine.generate = generate  # type: ignore[method-assign]
