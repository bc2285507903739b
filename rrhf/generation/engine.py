"""What writes responses: the protocol of every engine, and what a caller may rely on.

An engine yields N samples for each prompt as they finish, in any order and never fewer without a
word. What else it offers stands in its `capabilities`: a local engine gives ids and log-probs, an
endpoint perhaps text alone. Where it takes a seed, each sample's randomness derives from
(seed, round, prompt id, sample index), so that results do not depend on batches, order or
processes. Nothing here imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rrhf.errors import UserError
from rrhf.generation.params import SamplingParams
from rrhf.records import CandidateSet, FinishReason

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One response as an engine yields it.

    Attributes:
        prompt_ids: the prompt as the engine read it; None where it does not tell.
        token_ids: [T] sampled ids, EOS included where the response finished by itself; None from
            an engine that gives text alone.
        logprobs: [T] float32, nats, of the sampled tokens at the sampling temperature, before
            filters (top-k, top-p, repetition penalty); None where the engine gives none.
        finish_reason: "stop" (EOS or stop string), "length", or "unknown".
        text: the response as text, without EOS and without the stop string.
    """

    prompt_ids: Sequence[int] | None
    token_ids: Tensor | None
    logprobs: Tensor | None
    finish_reason: FinishReason
    text: str

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, as far as they are known."""
        return 0 if self.token_ids is None else len(self.token_ids)


@dataclass(frozen=True)
class Capabilities:
    """What an engine offers besides text.

    Attributes:
        ids: samples carry `prompt_ids` and `token_ids`.
        logprobs: samples carry `logprobs`.
        beams: it searches with beams.
        seeds: equal seeds draw equal responses.
        live_weights: it writes with the weights that the model has at that moment.
    """

    ids: bool = False
    logprobs: bool = False
    beams: bool = False
    seeds: bool = False
    live_weights: bool = False


_WORDS = {
    "ids": "token ids",
    "logprobs": "log-probs of sampled tokens",
    "beams": "beam search",
    "seeds": "seeded sampling",
    "live_weights": "the live weights of a policy in training",
}


class GenerationEngine(Protocol):
    """Writes responses; see the module text for what is promised."""

    @property
    def capabilities(self) -> Capabilities:
        """What it offers besides text."""

    def describe(self) -> dict[str, Any]:
        """What it is, for manifests; "engine" is the name that messages use."""

    def fits(self, prompt: CandidateSet, params: SamplingParams) -> bool:
        """Whether it can answer a prompt with a whole response."""

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        """The place of each prompt with its samples, as they finish."""


def engine_name(engine: GenerationEngine) -> str:
    """What messages call an engine."""
    return str(engine.describe().get("engine") or type(engine).__name__)


def responses(
    engine: GenerationEngine, prompts: Sequence[CandidateSet], params: SamplingParams
) -> Iterator[tuple[int, list[Sample]]]:
    """What an engine yields, held to its promises.

    Raises:
        UserError: it leaves a prompt out, gives other than N samples, or not what its
            capabilities promise.
    """
    has, waiting = engine.capabilities, set(range(len(prompts)))

    def refuse(what: str) -> UserError:
        return UserError(f"engine {engine_name(engine)}: {what}; fix the engine")

    for place, samples in engine.generate(prompts, params):
        if place not in waiting:
            raise refuse(f"answered prompt {place} of {len(prompts)} twice, or without being asked")
        waiting.remove(place)
        if len(samples) != params.num_return_sequences:
            raise refuse(
                f"gave {len(samples)} responses to prompt {prompts[place].id} where "
                f"{params.num_return_sequences} were asked for"
            )
        for sample in samples:
            if has.ids and (sample.prompt_ids is None or sample.token_ids is None):
                raise refuse("promises token ids, but a sample has none")
            if has.logprobs and sample.logprobs is None:
                raise refuse("promises log-probs, but a sample has none")
        yield place, samples
    if waiting:
        raise refuse(f"left {len(waiting)} of {len(prompts)} prompts without a response")


def answers(
    engine: GenerationEngine, prompts: Sequence[CandidateSet], params: SamplingParams
) -> list[list[Sample]]:
    """As `responses`, all of them, in the order of the prompts."""
    found = dict(responses(engine, prompts, params))
    return [found[place] for place in range(len(prompts))]


def missing_capabilities(engine: GenerationEngine, *wanted: str) -> list[str]:
    """Of some capabilities, what the engine does not offer, in words."""
    has = asdict(engine.capabilities)
    return [_WORDS[name] for name in wanted if not has[name]]


def require_capabilities(engine: GenerationEngine, purpose: str, *wanted: str) -> None:
    """Refuse an engine that lacks something, before it has written anything.

    Args:
        engine: any.
        purpose: what asks for it, for the message: "a rollout".
        wanted: names of capabilities.

    Raises:
        UserError: with everything that is missing.
    """
    if missing := missing_capabilities(engine, *wanted):
        raise UserError(
            f"engine {engine_name(engine)}: does not offer {', '.join(missing)}, which "
            f"{purpose} needs; choose an engine that does, such as local"
        )


def check_decoding(engine: GenerationEngine, params: SamplingParams) -> None:
    """Refuse beams of an engine without them; say where a seed means nothing.

    Raises:
        UserError: as `require_capabilities`.
    """
    if params.num_beams > 1:
        require_capabilities(engine, f"num_beams = {params.num_beams}", "beams")
    if params.do_sample and not engine.capabilities.seeds:
        logger.warning(
            "engine %s: takes no seed, so the same command draws other responses each time",
            engine_name(engine),
        )
