"""Prompts, a rollout writer and rows made by hand that the tests of rollouts share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ppo_cases import settings, workbench

from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.generation.local.engine import LocalEngine
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.models.policy_with_value import ActorCritic, ValueHead
from rrhf.records import CandidateSet
from rrhf.scoring.build import build_scorer
from rrhf.training.online.experience import RolloutRow
from rrhf.training.online.rollout import RolloutWriter


def prompts(world: Path) -> list[CandidateSet]:
    return list(read_candidate_sets(world / "prompts.jsonl"))


def writer(
    world: Path, temperature: float = 1.0, new_engine: Any = LocalEngine, **changes: Any
) -> RolloutWriter:
    config = settings(world, "unused", **changes)
    codec = ChatCodec(load_tokenizer(world / "model"), "raw")
    policy = Policy(load_causal_lm(world / "model"), LogprobOptions(temperature))
    root = ActorCritic(policy, ValueHead(32))
    reference = Policy(load_causal_lm(world / "model"), LogprobOptions(temperature))
    scorer = build_scorer(config.reward_model_name_or_path)
    return RolloutWriter(root, reference, scorer, config, workbench(config, codec), new_engine)


def hand_made_rows(lengths: tuple[int, ...] = (1, 4, 2, 3)) -> list[RolloutRow]:
    """Two responses to each prompt; scores 1, 2, 3, ...; no token has left the reference."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for place, length in enumerate(lengths):
        logprobs = -torch.rand(length, generator=generator)
        rows.append(
            RolloutRow(
                prompt=place // 2,
                sample=place % 2,
                prompt_ids=[5, 6],
                token_ids=list(range(10, 10 + length)),
                old_logprobs=logprobs,
                reference_logprobs=logprobs.clone(),
                values=torch.zeros(length),
                score=float(place + 1),
                is_finished=place != 1,
            )
        )
    return rows
