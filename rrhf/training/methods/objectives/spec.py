"""The interface of an offline objective over ranked candidates: settings, losses, needs.

An objective is one file: a dataclass of settings, whose fields are flags when it is chosen, and a
`build` that makes the losses from them. It gets a micro-batch as tables of prompts by candidates
and returns a loss for each prompt. The trainer weighs filler prompts, sums over ranks and divides
by counts. Nothing here imports torch, so that flags are read without it.

Legend: B prompts, K candidates of a prompt (padded; `valid` says which exist).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RankedGroups:
    """What is known of a micro-batch before the forward.

    Attributes:
        scores: [B, K] any scale, higher is better; any value where no candidate exists.
        lengths: [B, K] int64, tokens of each response, EOS included.
        valid: [B, K] True where a candidate exists.
        prompt_lengths: [B] int64, tokens.
        weights: [B] 0 for a filler prompt, else 1.
    """

    scores: Tensor
    lengths: Tensor
    valid: Tensor
    prompt_lengths: Tensor
    weights: Tensor


@dataclass(frozen=True)
class RankTerms:
    """What an objective makes of a micro-batch.

    Attributes:
        losses: name of a term -> [B] its loss for each prompt, with gradient.
        strengths: [B, K] by which the policy ranks its candidates, higher is better; accuracy,
            violations and margin are measured on it.
        metrics: further metrics: name -> ([B] totals, [B] counts), without gradient.
    """

    losses: dict[str, Tensor]
    strengths: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class RankLoss:
    """The losses of one objective under its settings.

    Attributes:
        weights: name of a term -> its weight in the loss.
        counts: of a micro-batch, name of a term -> [B] what each prompt adds to the number that the
            term's sum is divided by: 1, its pairs, its tokens, ...
        terms: (groups, [B, K] log-probs of whole responses in nats, the same under the reference or
            None where the objective needs none) -> its terms.
        without_order: what is learnt where no prompt has two candidates with different scores, for
            a warning; None where the order does not matter.
        released_rows: rows as the released RRHF program lays them out.
    """

    weights: Mapping[str, float]
    counts: Callable[[RankedGroups], dict[str, Tensor]]
    terms: Callable[[RankedGroups, Tensor, Tensor | None], RankTerms]
    without_order: str | None = "nothing is learnt"
    released_rows: bool = False


@dataclass(frozen=True)
class RankObjectiveSpec:
    """An objective as a registry holds it.

    Attributes:
        settings: a dataclass, whose fields are flags where the objective is chosen; None = none.
        build: makes its losses, given an instance of `settings`, or None.
        needs_reference: the log-probs of the policy as it was at the start.
    """

    settings: type | None
    build: Callable[[Any], RankLoss]
    needs_reference: bool = False
