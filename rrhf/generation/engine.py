"""What every engine that writes responses offers, and the settings it takes.

An engine returns N samples for each prompt, never silently fewer. A local engine fills token ids
and log-probs; an endpoint leaves them empty. Each sample's randomness derives from
(seed, round, prompt id, sample index), so results do not depend on batches, order or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from rrhf.records import CandidateSet, FinishReason


@dataclass(frozen=True)
class SamplingParams:
    """How responses are written.

    Attributes:
        num_return_sequences: N, responses for each prompt.
        max_new_tokens: budget of a response, EOS included.
        min_new_tokens: EOS is not allowed before this many tokens.
        do_sample: False = greedy (or beam search, with num_beams > 1).
        temperature: divides the logits; must be positive.
        top_k: keep the k likeliest tokens; 0 = off.
        top_p: keep the smallest set with this probability mass; 1.0 = off.
        repetition_penalty: 1.0 = off (Keskar et al. 2019).
        num_beams: beams of beam search; 1 = none.
        num_beam_groups: groups of diverse beam search (Vijayakumar et al. 2016); 1 = plain beams.
        diversity_penalty: subtracted per use of a token by earlier groups at the same step.
        length_penalty: beam scores are divided by length ** length_penalty.
        stop_strings: a response ends before the first of these; cut by token.
        seed: base of all randomness.
        round: number of the sampling round (online training), part of the randomness.
    """

    num_return_sequences: int = 4
    max_new_tokens: int = 128
    min_new_tokens: int = 1
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    stop_strings: tuple[str, ...] = field(default=())
    seed: int = 0
    round: int = 0


@dataclass(frozen=True)
class Sample:
    """What an engine yields: tokens first, text made from them.

    Attributes:
        token_ids: [T] sampled ids, EOS included where the response finished by itself; empty from
            an endpoint.
        logprobs: [T] float32, nats, of the sampled tokens at the sampling temperature, before
            filters (top-k, top-p, repetition penalty); empty from an endpoint.
        finish_reason: "stop" (EOS or stop string) or "length".
        text: the response as text, without EOS and without the stop string.
    """

    token_ids: Tensor
    logprobs: Tensor
    finish_reason: FinishReason
    text: str


class GenerationEngine(Protocol):
    """Writes responses; see the module text for what is promised."""

    name: str

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> list[list[Sample]]: ...
