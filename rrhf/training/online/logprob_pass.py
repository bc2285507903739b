"""The log-prob pass: computes old log-probs, values and reference log-probs of sampled responses.

In float32 the log-probs of sampling are used as the old log-probs, after a self-check: in every
rollout the longest response of each rank also goes through the trainer's forward pass. If the two
results differ on any rank, as they always do under bf16, the trainer computes the old log-probs of
all responses. Values are computed next (with a shared trunk, without the policy's head), then the
reference log-probs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.models.policy_with_value import ActorCritic
from rrhf.progress import pulse
from rrhf.training.core.parallel import Parallel
from rrhf.training.online.experience import RolloutRow

logger = logging.getLogger(__name__)

LOGPROB_TOLERANCE = 1e-4
"""Engine and trainer agree if no token's log-prob differs by more than this."""


class LogprobPass:
    """Computes log-probs and values of the rows of a rollout.

    Args:
        root: the trained actor-critic, in eval mode during the pass.
        reference: computes the log-probs [N, R] of a batch under the reference policy.
        codec: provides the pad and end ids.
        parallel: communicates between ranks.
        rows_at_a_time: rows in one forward pass.
        recompute: always use the trainer's log-probs.
    """

    def __init__(
        self,
        root: ActorCritic,
        reference: Callable[[TokenBatch], Tensor],
        codec: ChatCodec,
        parallel: Parallel,
        rows_at_a_time: int,
        recompute: bool = False,
    ) -> None:
        self._root, self._reference = root, reference
        self._codec, self._parallel = codec, parallel
        self._rows_at_a_time, self._recompute = rows_at_a_time, recompute
        self._said = False
        self._differences: list[Tensor] = []  # of compared tokens, in this rank's last pass

    def gap(self) -> tuple[float, float]:
        """Return how far the log-probs of sampling were from the trainer's in the last pass.

        Every rank must call this.

        Returns:
            The mean over the compared tokens of the rank where it is largest, and the largest of
            all: absolute differences, nats.
        """
        found = torch.cat([torch.zeros(1), *self._differences])
        mean = float(found.sum()) / max(len(found) - 1, 1)
        return self._parallel.max(mean), self._parallel.max(float(found.max()))

    def compute(self, rows: Sequence[RolloutRow]) -> None:
        """Fill in old log-probs and, with a critic, values. Every rank must call this."""
        self._differences = []
        recompute = self._must_recompute(rows)
        if not recompute and self._root.value is None:
            return
        batches = list(self._batches(rows))
        # All ranks run the same number of forward passes: if weights are sharded, each pass needs
        # all ranks.
        for place in range(int(self._parallel.max(len(batches)))):
            batch = batches[place] if place < len(batches) else []
            self._compute_batch(batch, recompute)
            pulse(f"{place + 1} of {len(batches)} batches of log-probs")

    def compute_reference(self, rows: Sequence[RolloutRow]) -> None:
        """Fill in log-probs under the reference; each rank works alone."""
        for number, batch in enumerate(self._batches(rows), 1):
            pulse(f"batch {number} of reference log-probs")
            found = self._reference(self._collated(batch)).cpu()
            for place, row in enumerate(batch):
                row.reference_logprobs = found[place, : len(row.token_ids)].clone()

    def _must_recompute(self, rows: Sequence[RolloutRow]) -> bool:
        """Whether to use the trainer's log-probs; all ranks get the same answer."""
        if self._recompute:
            self._say("under bf16 those of sampling are too inexact")
            return True
        trial = sorted(rows, key=lambda d: -len(d.token_ids))[:1]
        read = self._root(self._collated(trial)).logprobs.cpu()
        gaps = [float((read[0] - row.old_logprobs).abs().max()) for row in trial]
        self._differences = [(read[0] - row.old_logprobs).abs() for row in trial]
        gap = self._parallel.max(max(gaps, default=0.0))
        if gap > LOGPROB_TOLERANCE:
            self._say(f"those of sampling differ from the trainer's by up to {gap:.2g}")
            return True
        return False

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            logger.info("old log-probs are computed again by the trainer's own forward: %s", why)

    def _compute_batch(self, rows: Sequence[RolloutRow], recompute: bool) -> None:
        """Compute one batch; without rows, run the forward pass on a filler row."""
        outputs = self._root(self._collated(rows), values_only=not recompute)
        logprobs = outputs.logprobs.cpu()
        values = None if outputs.values is None else outputs.values.cpu()
        for place, row in enumerate(rows):
            tokens = slice(len(row.token_ids))
            if recompute:
                self._differences.append((logprobs[place, tokens] - row.old_logprobs).abs())
                row.old_logprobs = logprobs[place, tokens].clone()
            if values is not None:
                row.values = values[place, tokens].clone()

    def _batches(self, rows: Sequence[RolloutRow]) -> Iterator[Sequence[RolloutRow]]:
        """Yield batches of rows with similar lengths; responses to the same prompt are
        neighbours."""
        order = sorted(rows, key=lambda d: (len(d.prompt_ids), d.prompt, len(d.token_ids)))
        for first in range(0, len(order), self._rows_at_a_time):
            yield order[first : first + self._rows_at_a_time]

    def _collated(self, rows: Sequence[RolloutRow]) -> TokenBatch:
        filler = EncodedSet([self._codec.end_id], [[self._codec.end_id]])
        sets = [EncodedSet(d.prompt_ids, [d.token_ids]) for d in rows] or [filler]
        return collate(sets, self._codec.pad_id).to(self._parallel.device)
