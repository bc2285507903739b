"""What the trained actor-critic and the reference say of responses that were sampled.

In float32 the log-probs that sampling left are the old log-probs, and nothing is read for them but
a self-check: one response of every rank, its longest, passes the trainer's forward in every
rollout.
Where that differs on any rank (as under bf16 always) the trainer's are taken for all. Then values
are read, of a trunk that policy and critic share without the policy's head; then the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.generation.engine import Sample
from rrhf.models.forward.logprobs import PolicyOutputs
from rrhf.models.policy_with_value import ActorCritic
from rrhf.progress import pulse
from rrhf.training.core.parallel import Parallel

logger = logging.getLogger(__name__)

LOGPROB_TOLERANCE = 1e-4
"""Engine and trainer agree where no token's log-prob differs by more."""


@dataclass
class Draft:
    """A response of this rank on its way into a rollout."""

    prompt: int
    sample: int
    written: Sample
    score: float | None = None
    old_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))
    reference_logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))
    values: Tensor | None = None
    is_cut: bool = False

    # An engine that tells no ids or log-probs is refused before the first rollout.

    @property
    def prompt_ids(self) -> list[int]:
        assert self.written.prompt_ids is not None, "the engine tells ids"
        return list(self.written.prompt_ids)

    @property
    def token_ids(self) -> list[int]:
        assert self.written.token_ids is not None, "the engine tells ids"
        ids: list[int] = self.written.token_ids.tolist()
        return ids

    @property
    def sampled_logprobs(self) -> Tensor:
        """[T] as the engine gave them, float32."""
        assert self.written.logprobs is not None, "the engine tells log-probs"
        return self.written.logprobs.float()


class Reader:
    """Fills drafts in.

    Args:
        root: the trained actor-critic, in eval mode while it reads.
        reference: what the first policy says.
        codec: pad and end ids.
        parallel: ranks.
        rows_at_a_time: of one forward.
        recompute: old log-probs are the trainer's in any case.
    """

    def __init__(
        self,
        root: ActorCritic,
        reference: Callable[[TokenBatch], PolicyOutputs],
        codec: ChatCodec,
        parallel: Parallel,
        rows_at_a_time: int,
        recompute: bool = False,
    ) -> None:
        self._root, self._reference = root, reference
        self._codec, self._parallel = codec, parallel
        self._rows_at_a_time, self._recompute = rows_at_a_time, recompute
        self._said = False

    def read(self, drafts: Sequence[Draft]) -> None:
        """Old log-probs, and values where there is a critic; every rank must call it."""
        recompute = self._must_recompute(drafts)
        for draft in drafts:
            draft.old_logprobs = draft.sampled_logprobs
        if not recompute and self._root.value is None:
            return
        batches = list(self._batches(drafts))
        # Equally many on all ranks: where weights are spread, each is a call that all must join.
        for place in range(int(self._parallel.max(len(batches)))):
            batch = batches[place] if place < len(batches) else []
            self._read_batch(batch, recompute)
            pulse(f"{place + 1} of {len(batches)} batches of log-probs")

    def read_reference(self, drafts: Sequence[Draft]) -> None:
        """Log-probs under the reference; each rank by itself."""
        for number, batch in enumerate(self._batches(drafts), 1):
            pulse(f"batch {number} of reference log-probs")
            found = self._reference(self._collated(batch)).logprobs.cpu()
            for place, draft in enumerate(batch):
                draft.reference_logprobs = found[place, : draft.written.num_tokens].clone()

    def _must_recompute(self, drafts: Sequence[Draft]) -> bool:
        """Whether the trainer's log-probs are to be taken, agreed over ranks."""
        if self._recompute:
            self._say("under bf16 they are the trainer's")
            return True
        trial = sorted(drafts, key=lambda d: -d.written.num_tokens)[:1]
        read = self._root(self._collated(trial)).logprobs.cpu()
        gaps = [float((read[0] - draft.sampled_logprobs).abs().max()) for draft in trial]
        gap = self._parallel.max(max(gaps, default=0.0))
        if gap > LOGPROB_TOLERANCE:
            self._say(f"those of sampling differ from the trainer's by up to {gap:.2g}")
            return True
        return False

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            logger.info("old log-probs are computed again by the trainer's own forward: %s", why)

    def _read_batch(self, drafts: Sequence[Draft], recompute: bool) -> None:
        """Without a draft a filler is read, and forgotten."""
        outputs = self._root(self._collated(drafts), values_only=not recompute)
        logprobs = outputs.logprobs.cpu()
        values = None if outputs.values is None else outputs.values.cpu()
        for place, draft in enumerate(drafts):
            tokens = slice(draft.written.num_tokens)
            if recompute:
                draft.old_logprobs = logprobs[place, tokens].clone()
            if values is not None:
                draft.values = values[place, tokens].clone()

    def _batches(self, drafts: Sequence[Draft]) -> Iterator[Sequence[Draft]]:
        """Of similar lengths, the responses of a prompt side by side: it may be read once."""
        order = sorted(drafts, key=lambda d: (len(d.prompt_ids), d.prompt, d.written.num_tokens))
        for first in range(0, len(order), self._rows_at_a_time):
            yield order[first : first + self._rows_at_a_time]

    def _collated(self, drafts: Sequence[Draft]) -> TokenBatch:
        filler = EncodedSet([self._codec.end_id], [[self._codec.end_id]])
        sets = [EncodedSet(d.prompt_ids, [d.token_ids]) for d in drafts] or [filler]
        return collate(sets, self._codec.pad_id).to(self._parallel.device)
