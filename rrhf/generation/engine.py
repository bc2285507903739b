"""The interface of engines, which generate responses.

An engine yields the N samples of each prompt as soon as they are finished, with the prompts in any
order; fewer than N samples are an error. The engine's `capabilities` say what it offers in addition
to text: the local engine returns ids and log-probs, an endpoint perhaps neither. If an engine takes
a seed, the randomness of a sample derives from (seed, round, prompt id, sample index), so results
do not depend on batches, order or processes. Nothing here imports torch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
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
        prompt_ids: the prompt's ids as the engine read them; None if the engine does not report
            them.
        token_ids: [T] sampled ids, with EOS if the response ended by itself; None if the engine
            returns only text.
        logprobs: [T] float32, nats, of the sampled tokens at the sampling temperature, before
            filters (top-k, top-p, repetition penalty); None if the engine reports no log-probs.
        finish_reason: "stop" (EOS or stop string), "length", or "unknown".
        text: the response as text, without EOS and without the stop string.
        failure: why there is no response, such as "refusal: ..."; "" if there is one. A sample with
            a failure is counted, and used for nothing.
        reported_tokens: number of tokens that the engine reports, if the ids are not known.
    """

    prompt_ids: Sequence[int] | None
    token_ids: Tensor | None
    logprobs: Tensor | None
    finish_reason: FinishReason
    text: str
    failure: str = ""
    reported_tokens: int | None = None

    @property
    def known_tokens(self) -> int | None:
        """Number of sampled tokens; None if it is not known."""
        return self.reported_tokens if self.token_ids is None else len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Number of sampled tokens; 0 if it is not known."""
        return self.known_tokens or 0


@dataclass(frozen=True)
class Capabilities:
    """What an engine offers in addition to text.

    Attributes:
        ids: samples have `prompt_ids` and `token_ids`.
        logprobs: samples have `logprobs`.
        beams: the engine can do beam search.
        seeds: the same seed gives the same responses.
        live_weights: the engine uses the model's current weights, even while the model is trained.
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
    """Generates responses, under the rules in the module's docstring.

    An engine that costs money may have three further methods, which are called by the functions
    `announce`, `usage` and `finish` of this module.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What the engine offers in addition to text."""

    def describe(self) -> dict[str, Any]:
        """Describe the engine for manifests; messages use the entry "engine" as its name."""

    def fits(self, prompt: CandidateSet, params: SamplingParams) -> bool:
        """Whether the prompt leaves room for a whole response."""

    def generate(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> Iterator[tuple[int, list[Sample]]]:
        """Yield the index of each prompt with its samples, as soon as they are finished."""


class EngineFault(Exception):
    """An engine in another process did not do what was asked, and may do so if asked again."""


class SyncedEngine(GenerationEngine, Protocol):
    """An engine in another process, which is given the policy's weights through a folder.

    Its `generate` raises `EngineFault` if the process failed.
    """

    @property
    def retries(self) -> int:
        """How often work is repeated that failed because of the process."""

    @property
    def bound(self) -> float:
        """Largest mean difference of log-probs between engine and policy, nats per token."""

    def sync_folder(self) -> Path | None:
        """Return the folder in which weights are passed; None = within the run folder."""

    def load(self, policy_folder: Path) -> dict[str, float]:
        """Take the weights of a folder, and check that they are the policy's; return measured
        differences for the log.

        Raises:
            EngineFault: the process failed, or its weights are not the policy's.
        """

    def require_same(self) -> None:
        """Check that the weights are still those of the last `load`; errors as there."""

    def wait(self) -> None:
        """Wait until the process answers again.

        Raises:
            UserError: it does not come back.
        """


def announce(
    engine: GenerationEngine, prompts: Sequence[CandidateSet], *params: SamplingParams
) -> None:
    """Tell an engine what it will be asked before it is asked anything, if it wants to know.

    Args:
        engine: the engine; its method `announce` takes the same arguments.
        prompts: all prompts.
        params: each way in which all prompts will be answered.

    Raises:
        NothingSent: the engine makes a dry run; the message is its result.
    """
    if tell := getattr(engine, "announce", None):
        tell(prompts, *params)


def usage(engine: GenerationEngine) -> dict[str, Any]:
    """Return what an engine's work cost, for manifests; empty if it does not say."""
    said: dict[str, Any] = getattr(engine, "usage", dict)()
    return {"usage": said} if said else {}


def finish(engine: GenerationEngine) -> None:
    """Tell an engine that all its responses are in a finished file, if it wants to know."""
    getattr(engine, "finish", lambda: None)()


def engine_name(engine: GenerationEngine) -> str:
    """Return the name of an engine for messages."""
    return str(engine.describe().get("engine") or type(engine).__name__)


def responses(
    engine: GenerationEngine, prompts: Sequence[CandidateSet], params: SamplingParams
) -> Iterator[tuple[int, list[Sample]]]:
    """Generate with an engine, and check that it yields what it promises.

    Raises:
        UserError: the engine leaves a prompt out, answers a prompt twice, does not return N
            samples, or its samples lack something that its capabilities promise.
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
                f"gave {len(samples)} responses to prompt {prompts[place].id}, but "
                f"{params.num_return_sequences} were requested"
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
    """Generate as `responses` does, but return all samples at once, in the order of the prompts."""
    found = dict(responses(engine, prompts, params))
    return [found[place] for place in range(len(prompts))]


def missing_capabilities(engine: GenerationEngine, *wanted: str) -> list[str]:
    """Describe the wanted capabilities that the engine does not offer."""
    has = asdict(engine.capabilities)
    return [_WORDS[name] for name in wanted if not has[name]]


def require_capabilities(engine: GenerationEngine, purpose: str, *wanted: str) -> None:
    """Refuse an engine that lacks a capability, before it generates anything.

    Args:
        engine: the engine to check.
        purpose: what needs the capabilities, for the message, such as "a rollout".
        wanted: names of capabilities.

    Raises:
        UserError: capabilities are missing; the message lists them.
    """
    if missing := missing_capabilities(engine, *wanted):
        raise UserError(
            f"engine {engine_name(engine)}: does not offer {', '.join(missing)}, which "
            f"{purpose} needs; choose an engine that does, such as local"
        )


def check_decoding(engine: GenerationEngine, params: SamplingParams) -> None:
    """Refuse beam search if the engine does not offer it; warn if the engine takes no seed.

    Raises:
        UserError: as in `require_capabilities`.
    """
    if params.num_beams > 1:
        require_capabilities(engine, f"num_beams = {params.num_beams}", "beams")
    if params.do_sample and not engine.capabilities.seeds:
        logger.warning(
            "engine %s: takes no seed, so the same command gives other responses each time",
            engine_name(engine),
        )
