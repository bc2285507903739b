"""Makes a rollout: the live policy answers prompts, and the answers get scores and log-probs.

Each rank answers its share of the prompts; then the rows are gathered, so that all ranks hold the
whole rollout. If weights are sharded, a rank samples with a whole copy (`whole_copy`), so that no
rank waits for the longest response of another. The log-prob pass then goes through the actor-critic
itself; ranks with fewer rows add fillers.

Training uses exactly the ids that were sampled. `logprob_pass` computes their log-probs under the
actor-critic and the reference.

Empty responses (which begin with a stop string) and responses that could not be scored are left out
and counted. A signal to any rank drops the rollout on all ranks: at once, or at the end of work
that all ranks do together.

Any engine that samples from the current weights and returns ids and log-probs can be used.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import torch

from rrhf.commands import command_of
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import StoppedBySignal, UserError
from rrhf.generation.engine import (
    GenerationEngine,
    Sample,
    SyncedEngine,
    answers,
    require_capabilities,
)
from rrhf.generation.fitting import Fit
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.params import SamplingParams
from rrhf.models.eval_mode import eval_mode
from rrhf.models.forward.logprobs import Policy
from rrhf.models.policy_with_value import ActorCritic
from rrhf.records import Candidate, CandidateSet
from rrhf.runs import RunFolder
from rrhf.scoring.scorer import Scorer
from rrhf.training.core.phases import Phases, Spent, over_ranks, peak_meter
from rrhf.training.core.reference import Reference
from rrhf.training.core.setup import Workbench
from rrhf.training.online.experience import RolloutRow
from rrhf.training.online.logprob_pass import LogprobPass
from rrhf.training.online.ppo_config import PPOConfig
from rrhf.training.online.response_ends import StopToken, is_loop
from rrhf.training.online.weight_sync import WeightSync
from rrhf.training.online.whole_copy import WholeCopy

logger = logging.getLogger(__name__)

T = TypeVar("T")


class UnusableRollout(UserError):
    """Too many responses have no score, or no response is left; raised on every rank.

    Attributes:
        reason: the first part of the message, which says what is wrong but not how to fix it.
    """

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason + cure)
        self.reason = reason


@dataclass(frozen=True)
class Rollout:
    """The responses of all ranks.

    Attributes:
        rows: the responses, sorted by prompt and sample.
        counts: number of sampled responses, and of left-out responses by reason.
        spent: time and memory by phase, including the training steps since the last rollout.
        measures: of an engine in another process, for the metrics log.
    """

    rows: list[RolloutRow]
    counts: Counter[str]
    spent: dict[str, Spent]
    measures: dict[str, float] = field(default_factory=dict)


class RolloutWriter:
    """Samples responses from the policy's current weights, scores them and computes log-probs.

    Args:
        root: the trained actor-critic itself, before it is wrapped and distributed.
        reference: a frozen copy of the first policy, whole on each rank; None = the policy's own
            weights, adapters off.
        scorer: scores the responses.
        config: sampling and batch sizes.
        bench: the opened run.
        new_engine: makes the engine from the policy's model, the codec, the number of rows to
            sample at a time and the largest number of tokens in a prompt.

    Raises:
        UserError: the engine lacks something that a rollout needs.

    Attributes:
        room: largest number of prompt tokens with which a response of full length still fits.
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
        self._root = root
        self._stop = bench.stop
        self._phases = bench.phases or Phases(peak_meter(parallel.device))
        self._codec, self._scorer = codec, scorer
        self._config, self._parallel = config, parallel
        self._told_too_long = False
        self._stop_token: StopToken | None = None
        if config.truncate_token is not None:
            self._stop_token = StopToken(
                codec.tokenizer, config.truncate_token, config.truncate_after
            )
        self._copy = None if parallel.weights_are_whole else WholeCopy(root.policy, parallel)
        self._policy = root.policy if self._copy is None else self._copy.policy
        self.room = config.model_max_length - config.max_new_tokens
        rows_at_a_time = config.per_device_prompt_batch_size * config.num_return_sequences
        self._engine = new_engine(self._policy.model, codec, rows_at_a_time, self.room)
        require_capabilities(self._engine, "a rollout", "ids", "logprobs", "seeds", "live_weights")
        self._sync: WeightSync | None = None
        if hasattr(self._engine, "load"):  # it is in another process
            engine = cast(SyncedEngine, self._engine)
            self._sync = WeightSync(
                engine, self._policy.model, config.temperature, bench.run.path, parallel, self._stop
            )
        first = Reference(reference, self._policy, parallel)
        self._logprob_pass = LogprobPass(root, first, codec, parallel, rows_at_a_time, config.bf16)

    @property
    def codec(self) -> ChatCodec:
        """Turns prompts into tokens and back."""
        return self._codec

    def fit(self, prompt: CandidateSet) -> Fit:
        """Check whether a prompt, cut by whole turns, leaves room for a response."""
        length = len(self._codec.encode_prompt(prompt) or ())
        if not self._engine.fits(prompt, self._config.sampling(0)):
            return Fit(length, "without room for a response")
        return Fit(length, is_cut=length > self.room)

    def write(
        self, prompts: Sequence[CandidateSet], number: int, samples_per_prompt: int | None = None
    ) -> Rollout:
        """Answer the prompts of a rollout; every rank must call it, with the same prompts.

        Args:
            prompts: prompts that fit; a repeated prompt gets different answers.
            number: number of the rollout; the random seed depends on it.
            samples_per_prompt: responses to each prompt; None = num_return_sequences.

        Raises:
            UnusableRollout: too many responses could not be scored, or all were left out.
            StoppedBySignal: a rank received a signal; raised on all ranks.
        """
        places = list(range(self._parallel.rank, len(prompts), self._parallel.world_size))
        renamed = _with_own_ids(prompts)
        part = Rollout([], Counter(), {})
        with eval_mode(self._root), torch.no_grad():
            if self._copy is not None:
                with self._phases("gather"):
                    self._copy.refresh()
            with contextlib.suppress(StoppedBySignal):
                mine = self._sample(renamed, places, number, samples_per_prompt, part.counts)
                part.rows.extend(self._score(mine, renamed, part.counts))
            self._stop_together(number)
            with contextlib.suppress(StoppedBySignal):
                self._read(part.rows)
        self._stop_together(number)
        if self._sync is not None:
            self._sync.require_close(*self._logprob_pass.gap())
        part.spent.update(self._phases.take())
        parts = self._parallel.gather([part])
        rows = sorted((row for p in parts for row in p.rows), key=lambda r: (r.prompt, r.sample))
        counts: Counter[str] = Counter()
        for one in parts:
            counts.update(one.counts)
        self._check(rows, counts)
        measures = {} if self._sync is None else dict(self._sync.measures)
        return Rollout(rows, counts, over_ranks(one.spent for one in parts), measures)

    def _stop_together(self, number: int) -> None:
        if code := int(self._parallel.max(self._stop.exit_code)):
            raise StoppedBySignal(code, f"rollout {number} was dropped")

    def _alone(self, work: Callable[[], T]) -> T:
        """Do work without communication between ranks, so that a signal can stop it at once."""
        return self._stop.run(work, "the rollout is dropped")

    def _sample(
        self,
        prompts: Sequence[CandidateSet],
        places: Sequence[int],
        number: int,
        samples_per_prompt: int | None,
        counts: Counter[str],
    ) -> list[RolloutRow]:
        """Sample responses to the prompts at these indices; leave out empty responses."""
        params = self._config.sampling(number)
        if samples_per_prompt is not None:
            params = replace(params, num_return_sequences=samples_per_prompt)
        mine = [prompts[place] for place in places]
        with self._phases("generate") as spent, self._parallel.autocast():
            answered = self._answers(mine, params)
            sampled = [
                self._row(place, number, sample)
                for place, samples in zip(places, answered, strict=True)
                for number, sample in enumerate(samples)
            ]
            spent.tokens = sum(len(row.token_ids) for row in sampled)
        rows = [self._cut(row, prompts[row.prompt]) for row in sampled]
        kept = [row for row in rows if row.token_ids]
        end_ids = self._codec.end_ids
        counts.update(
            sampled=len(rows),
            empty=len(rows) - len(kept),
            cut=sum(row is not whole for row, whole in zip(rows, sampled, strict=True)),
            unfinished=sum(row.finish == "length" for row in rows),
            looped=sum(is_loop([i for i in row.token_ids if i not in end_ids]) for row in rows),
        )
        return kept

    def _answers(
        self, prompts: Sequence[CandidateSet], params: SamplingParams
    ) -> list[list[Sample]]:
        if self._sync is not None:
            return self._sync.answers(prompts, params)
        return self._alone(lambda: answers(self._engine, prompts, params))

    def _row(self, place: int, number: int, sample: Sample) -> RolloutRow:
        # `require_capabilities` has refused an engine that does not return ids and log-probs.
        assert sample.prompt_ids is not None, "the engine gives prompt ids"
        assert sample.token_ids is not None and sample.logprobs is not None, "it gives log-probs"
        ids = sample.token_ids.tolist()
        return RolloutRow(
            place,
            number,
            list(sample.prompt_ids),
            ids,
            sample.logprobs.float(),
            is_finished=bool(ids) and ids[-1] in self._codec.end_ids,
            text=sample.text,
            finish=sample.finish_reason,
        )

    def _cut(self, row: RolloutRow, prompt: CandidateSet) -> RolloutRow:
        """Cut a response after its stop token, if it has one."""
        kept = None if self._stop_token is None else self._stop_token.kept(row.token_ids)
        if kept is None:
            return row
        ids = row.token_ids[:kept]
        return replace(
            row,
            token_ids=ids,
            old_logprobs=row.old_logprobs[:kept],
            is_finished=True,
            text=self._codec.decode_response(prompt, ids),
            finish="stop",
        )

    def _score(
        self, rows: Sequence[RolloutRow], prompts: Sequence[CandidateSet], counts: Counter[str]
    ) -> list[RolloutRow]:
        """Fill in scores, and leave out rows that could not be scored."""
        groups: dict[int, list[RolloutRow]] = {}
        for row in rows:
            groups.setdefault(row.prompt, []).append(row)
        sets = [
            replace(
                prompts[place],
                candidates=tuple(
                    Candidate(row.text, "policy:live", None, row.finish) for row in group
                ),
            )
            for place, group in groups.items()
        ]
        with self._phases("score") as spent:
            scores = self._alone(lambda: self._scorer.score(sets) if sets else [])
            spent.tokens = _num_tokens(rows)
        kept, too_long = [], 0
        for s, group, found in zip(sets, groups.values(), scores, strict=True):
            for candidate, row, score in zip(s.candidates, group, found, strict=True):
                if score is not None:
                    row.score = score
                    kept.append(row)
                else:
                    too_long += not self._scorer.fits(s, candidate)
        counts.update(unscored=len(rows) - len(kept), too_long_to_score=too_long)
        return kept

    def _read(self, rows: Sequence[RolloutRow]) -> None:
        """Fill in old log-probs and values, then reference log-probs."""
        with self._phases("read") as spent, self._parallel.autocast():
            # With several ranks, a forward pass may need all ranks, so a signal must not stop it.
            if self._parallel.world_size == 1:
                self._alone(lambda: self._logprob_pass.compute(rows))
            else:
                self._logprob_pass.compute(rows)
            spent.tokens = _num_tokens(rows)
        with self._phases("reference") as spent, self._parallel.autocast():
            self._alone(lambda: self._logprob_pass.compute_reference(rows))
            spent.tokens = _num_tokens(rows)

    def _check(self, rows: Sequence[RolloutRow], counts: Counter[str]) -> None:
        limit, too_long = self._config.max_unscored_fraction, counts["too_long_to_score"]
        failed = counts["unscored"] - too_long
        if failed > limit * counts["sampled"]:
            changes: dict[str, Any] = {"max_unscored_fraction": 1.0}
            if not RunFolder(self._config.output_dir).is_bare:  # a bare folder is discarded
                changes["resume_from_checkpoint"] = True
            raise UnusableRollout(
                f"{self._scorer.name}: {failed} of {counts['sampled']} responses could "
                f"not be scored, more than --max_unscored_fraction {limit}",
                "; fix the scorer, or continue without these responses: "
                + command_of("rrhf train ppo", self._config, **changes),
            )
        if too_long and not self._told_too_long:
            self._told_too_long = True
            logger.info(
                "%s: %d of %d responses of a rollout exceed its window and are left out; further "
                "ones are only counted (too_long_to_score in the manifest)",
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
                "; use a reward model with a longer window, or lower --model_max_length or "
                "--max_new_tokens",
            )
        if not rows:
            raise UnusableRollout(
                f"all {counts['sampled']} responses of a rollout are empty: the policy ends before "
                "its first word",
                "; check --chat_format, or start from a fine-tuned policy",
            )


def _num_tokens(rows: Sequence[RolloutRow]) -> int:
    """Count the tokens of prompts and responses together."""
    return sum(len(row.prompt_ids) + len(row.token_ids) for row in rows)


def _with_own_ids(prompts: Sequence[CandidateSet]) -> list[CandidateSet]:
    """Give each repeated prompt a distinct id, since equal ids would draw equal responses."""
    seen: Counter[str] = Counter()
    renamed = []
    for prompt in prompts:
        times = seen[prompt.id]
        renamed.append(replace(prompt, id=f"{prompt.id}#{times}") if times else prompt)
        seen[prompt.id] += 1
    return renamed
