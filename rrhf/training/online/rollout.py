"""A rollout: the live policy answers prompts, and everything that is to be known of the answers.

Each rank answers its share of the prompts; then the rows come together, so that all ranks hold the
whole rollout. Where weights are spread, a rank samples with a whole copy (`whole_copy`), so nobody
waits for another's longest response. The log-prob pass then goes through the actor-critic itself;
ranks with fewer rows join in with fillers.

The ids that were sampled are the ids that are trained on. `reading` asks the actor-critic and the
reference for their log-probs.

Responses without a token (a stop string at once) and those that could not be scored are left out
and counted. A signal drops a rollout, on all ranks, also where one alone got it: at once, or, where
ranks read together, behind that.

Any engine will do that writes with the live weights and tells ids and log-probs.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from rrhf.commands import command_of
from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import TokenBatch
from rrhf.errors import StoppedBySignal, UserError
from rrhf.generation.engine import GenerationEngine, answers, require_capabilities
from rrhf.generation.local.engine import LocalEngine
from rrhf.models.forward.logprobs import Policy, PolicyOutputs
from rrhf.models.policy_with_value import ActorCritic, as_reference
from rrhf.records import Candidate, CandidateSet
from rrhf.runs import RunFolder
from rrhf.scoring.scorer import Scorer
from rrhf.training.core.phases import Phases, Spent, over_ranks, peak_meter
from rrhf.training.core.setup import Workbench
from rrhf.training.online.experience import RolloutRow
from rrhf.training.online.ppo_config import PPOConfig
from rrhf.training.online.reading import Draft, Reader
from rrhf.training.online.response_ends import StopToken, is_loop
from rrhf.training.online.whole_copy import WholeCopy

logger = logging.getLogger(__name__)

T = TypeVar("T")


class UnusableRollout(UserError):
    """Too many responses lack a score, or none is left; every rank raises it.

    Attributes:
        reason: without what to do about it.
    """

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason + cure)
        self.reason = reason


@dataclass(frozen=True)
class Rollout:
    """What all ranks have sampled together.

    Attributes:
        rows: by prompt and sample.
        counts: responses sampled, left out and why.
        spent: by phase, since the rollout or the training step before it.
    """

    rows: list[RolloutRow]
    counts: Counter[str]
    spent: dict[str, Spent]


class RolloutWriter:
    """Samples, scores and reads responses of the policy as it is at that moment.

    Args:
        root: the trained actor-critic itself, which stays live under any wrapping; not spread yet.
        reference: a frozen copy of the first policy, whole on each rank; None = the policy's own
            weights, adapters off.
        scorer: any.
        config: sampling and batch sizes.
        bench: of the run.
        new_engine: makes the engine of the live model, the codec, rows at a time and the room of a
            prompt.

    Raises:
        UserError: the engine lacks something that a rollout needs.
    """

    def __init__(
        self,
        root: ActorCritic,
        reference: Policy | None,
        scorer: Scorer,
        config: PPOConfig,
        bench: Workbench,
        new_engine: Callable[[Any, ChatCodec, int, int], GenerationEngine] = LocalEngine,
    ) -> None:
        codec, parallel = bench.codec, bench.parallel
        self._root, self._reference = root, reference
        self._stop = bench.stop
        self._phases = bench.phases or Phases(peak_meter(parallel.device))
        self._codec, self._scorer = codec, scorer
        self._config, self._parallel = config, parallel
        self._rows_at_a_time = config.per_device_prompt_batch_size * config.num_return_sequences
        self._told_too_long = False
        self._stop_token: StopToken | None = None
        if config.truncate_token is not None:
            self._stop_token = StopToken(
                codec.tokenizer, config.truncate_token, config.truncate_after
            )
        self._copy = None if parallel.weights_are_whole else WholeCopy(root.policy, parallel)
        self._policy = root.policy if self._copy is None else self._copy.policy
        room = config.model_max_length - config.max_new_tokens
        self._engine = new_engine(self._policy.model, codec, self._rows_at_a_time, room)
        require_capabilities(self._engine, "a rollout", "ids", "logprobs", "seeds", "live_weights")
        self._reader = Reader(
            root, self._first_policy, codec, parallel, self._rows_at_a_time, config.bf16
        )

    @property
    def codec(self) -> ChatCodec:
        """How prompts become tokens."""
        return self._codec

    def fits(self, prompt: CandidateSet) -> bool:
        """Whether the prompt, cut by whole turns, leaves room for a response."""
        return self._engine.fits(prompt, self._config.sampling(0))

    def is_cut(self, prompt: CandidateSet) -> bool:
        """Whether a prompt that fits loses its beginning."""
        whole = self._codec.encode_prompt(prompt)
        room = self._config.model_max_length - self._config.max_new_tokens
        return whole is not None and len(whole) > room

    def write(
        self, prompts: Sequence[CandidateSet], number: int, samples_per_prompt: int | None = None
    ) -> Rollout:
        """Answer the prompts of a rollout; every rank must call it, with the same prompts.

        Args:
            prompts: that fit; one may occur several times, and is then answered differently.
            number: of the rollout, part of the randomness.
            samples_per_prompt: by default as the settings have it.

        Raises:
            UnusableRollout: too many responses could not be scored, or all were left out.
            StoppedBySignal: a signal came on some rank; on all of them.
        """
        places = list(range(self._parallel.rank, len(prompts), self._parallel.world_size))
        renamed = _with_own_ids(prompts)
        part = Rollout([], Counter(), {})
        with _evaluating(self._root), torch.no_grad():
            if self._copy is not None:
                with self._phases("gather"):
                    self._copy.refresh()
            drafts: list[Draft] = []
            with contextlib.suppress(StoppedBySignal):
                drafts = self._sample(renamed, places, number, samples_per_prompt, part.counts)
                drafts = self._score(drafts, renamed, part.counts)
            self._stop_together(number)
            with contextlib.suppress(StoppedBySignal):
                self._read(drafts)
                part.rows.extend(self._rows(drafts))
        self._stop_together(number)
        part.spent.update(self._phases.take())
        parts = self._parallel.gather([part])
        rows = sorted((row for p in parts for row in p.rows), key=lambda r: (r.prompt, r.sample))
        counts: Counter[str] = Counter()
        for one in parts:
            counts.update(one.counts)
        self._check(rows, counts)
        return Rollout(rows, counts, over_ranks(one.spent for one in parts))

    def _stop_together(self, number: int) -> None:
        if code := int(self._parallel.max(self._stop.exit_code)):
            raise StoppedBySignal(code, f"rollout {number} was dropped")

    def _alone(self, work: Callable[[], T]) -> T:
        """Work without a word to other ranks: a signal cuts it off at once."""
        return self._stop.run(work, "the rollout is dropped")

    def _sample(
        self,
        prompts: Sequence[CandidateSet],
        places: Sequence[int],
        number: int,
        samples_per_prompt: int | None,
        counts: Counter[str],
    ) -> list[Draft]:
        """Responses to the prompts at these places, those without a token left out."""
        params = self._config.sampling(number)
        if samples_per_prompt is not None:
            params = replace(params, num_return_sequences=samples_per_prompt)
        mine = [prompts[place] for place in places]
        with self._phases("generate") as spent, self._parallel.autocast():
            written = self._alone(lambda: answers(self._engine, mine, params))
            drafts = [
                Draft(place, number, sample)
                for place, samples in zip(places, written, strict=True)
                for number, sample in enumerate(samples)
            ]
            spent.tokens = sum(draft.written.num_tokens for draft in drafts)
        drafts = [self._cut(draft, prompts) for draft in drafts]
        kept = [draft for draft in drafts if draft.written.num_tokens]
        counts.update(
            sampled=len(drafts), empty=len(drafts) - len(kept), **self._degenerate(drafts)
        )
        return kept

    def _cut(self, draft: Draft, prompts: Sequence[CandidateSet]) -> Draft:
        """The response up to its stop token, where it has one."""
        ids = draft.token_ids
        kept = None if self._stop_token is None else self._stop_token.kept(ids)
        if kept is None:
            return draft
        text = self._codec.decode_response(prompts[draft.prompt], draft.prompt_ids, ids[:kept])
        cut = replace(
            draft.written,
            token_ids=torch.tensor(ids[:kept]),
            logprobs=draft.sampled_logprobs[:kept],
            finish_reason="stop",
            text=text,
        )
        return replace(draft, written=cut, is_cut=True)

    def _degenerate(self, drafts: Sequence[Draft]) -> dict[str, int]:
        """How many responses were cut, and how many have little worth, by what they lack."""
        end_ids = self._codec.end_ids
        found = Counter(cut=0, unfinished=0, looped=0)
        for draft in drafts:
            words = [token for token in draft.token_ids if token not in end_ids]
            found["cut"] += draft.is_cut
            found["unfinished"] += draft.written.finish_reason == "length"
            found["looped"] += is_loop(words)
        return dict(found)

    def _score(
        self, drafts: Sequence[Draft], prompts: Sequence[CandidateSet], counts: Counter[str]
    ) -> list[Draft]:
        """The drafts with a score; those that could not be scored are left out."""
        groups: dict[int, list[Draft]] = {}
        for draft in drafts:
            groups.setdefault(draft.prompt, []).append(draft)
        sets = [
            replace(
                prompts[place],
                candidates=tuple(
                    Candidate(d.written.text, "policy:live", None, d.written.finish_reason)
                    for d in group
                ),
            )
            for place, group in groups.items()
        ]
        with self._phases("score") as spent:
            scores = self._alone(lambda: self._scorer.score(sets) if sets else [])
            spent.tokens = _num_tokens(drafts)
        too_long = 0
        for s, group, found in zip(sets, groups.values(), scores, strict=True):
            for candidate, draft, score in zip(s.candidates, group, found, strict=True):
                draft.score = score
                too_long += score is None and not self._scorer.fits(s, candidate)
        kept = [draft for draft in drafts if draft.score is not None]
        counts.update(unscored=len(drafts) - len(kept), too_long_to_score=too_long)
        return kept

    def _read(self, drafts: Sequence[Draft]) -> None:
        """Old log-probs and values, then reference log-probs."""
        # The actor-critic's forward may be one that all ranks must do together.
        run = self._alone if self._parallel.world_size == 1 else _do
        with self._phases("read") as spent, self._parallel.autocast():
            run(lambda: self._reader.read(drafts))
            spent.tokens = _num_tokens(drafts)
        with self._phases("reference") as spent, self._parallel.autocast():
            self._alone(lambda: self._reader.read_reference(drafts))
            spent.tokens = _num_tokens(drafts)

    def _first_policy(self, batch: TokenBatch) -> PolicyOutputs:
        if self._reference is not None:
            found: PolicyOutputs = self._reference(batch)
            return found
        with as_reference(self._policy) as policy:
            found = policy(batch)
            return found

    def _rows(self, drafts: Sequence[Draft]) -> list[RolloutRow]:
        rows = []
        for d in drafts:
            assert d.score is not None, "responses without a score were left out"
            rows.append(
                RolloutRow(
                    d.prompt,
                    d.sample,
                    d.prompt_ids,
                    d.token_ids,
                    d.old_logprobs,
                    d.reference_logprobs,
                    d.values,
                    d.score,
                    d.is_cut or d.token_ids[-1] in self._codec.end_ids,
                    d.written.text,
                    d.written.finish_reason,
                )
            )
        return rows

    def _check(self, rows: Sequence[RolloutRow], counts: Counter[str]) -> None:
        limit, too_long = self._config.max_unscored_fraction, counts["too_long_to_score"]
        failed = counts["unscored"] - too_long
        if failed > limit * counts["sampled"]:
            changes: dict[str, Any] = {"max_unscored_fraction": 1.0}
            if not RunFolder(self._config.output_dir).is_bare:  # else it is discarded
                changes["resume_from_checkpoint"] = True
            raise UnusableRollout(
                f"{self._scorer.name}: {failed} of {counts['sampled']} responses could "
                f"not be scored, more than --max_unscored_fraction {limit}",
                "; fix the scorer, or go on without them: "
                + command_of("rrhf train ppo", self._config, **changes),
            )
        if too_long and not self._told_too_long:
            self._told_too_long = True
            logger.info(
                "%s: %d of %d responses of a rollout exceed its window and are left out; more are "
                "only counted (too_long_to_score in the manifest)",
                self._scorer.name,
                too_long,
                counts["sampled"],
            )
        if not rows and failed:
            raise UnusableRollout(
                f"{self._scorer.name}: scored none of the {counts['sampled']} responses of a "
                f"rollout ({failed} without a score, {too_long} beyond its window, "
                f"{counts['empty']} empty)",
                ", so there is nothing to learn from; fix the scorer",
            )
        if not rows and too_long:
            raise UnusableRollout(
                f"{self._scorer.name}: none of the {counts['sampled']} responses of a rollout fits "
                "its window",
                "; take a reward model with a longer one, or lower --model_max_length or "
                "--max_new_tokens",
            )
        if not rows:
            raise UnusableRollout(
                f"all {counts['sampled']} responses of a rollout are empty: the policy ends before "
                "its first word",
                "; check --chat_format, or start from a fine-tuned policy",
            )


def _do(work: Callable[[], T]) -> T:
    return work()


def _num_tokens(drafts: Sequence[Draft]) -> int:
    """Prompts and responses."""
    return sum(len(d.prompt_ids) + d.written.num_tokens for d in drafts)


def _with_own_ids(prompts: Sequence[CandidateSet]) -> list[CandidateSet]:
    """Gives a repeated prompt an id of its own: equal ids would draw equal responses."""
    seen: Counter[str] = Counter()
    renamed = []
    for prompt in prompts:
        times = seen[prompt.id]
        renamed.append(replace(prompt, id=f"{prompt.id}#{times}") if times else prompt)
        seen[prompt.id] += 1
    return renamed


@contextlib.contextmanager
def _evaluating(root: ActorCritic) -> Iterator[None]:
    was_training = root.training
    root.eval()
    try:
        yield
    finally:
        root.train(was_training)
