"""What every engine that writes responses offers.

An engine returns N samples for each prompt, never silently fewer. A local engine fills token ids
and log-probs; an endpoint leaves them empty. Each sample's randomness derives from
(seed, round, prompt id, sample index), so results do not depend on batches, order or processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rrhf.generation.params import SamplingParams
from rrhf.records import CandidateSet, FinishReason


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
