"""What a metric is: its columns, what it needs, and how it is measured.

A metric is one file. It sees a row while it is being measured (`rrhf.evaluation.draft.Draft`) and
gives values by prompt, from which means, intervals and paired differences follow. Nothing here
imports torch or numpy, so that flags are read without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rrhf.evaluation.draft import Draft
    from rrhf.evaluation.measure import Measure

NEEDS = {
    "scorer": "a scorer (--scorer)",
    "gold": "prompts of a world that knows their gold (--gold)",
    "judge": "a scorer or a world with gold (--scorer, --gold)",
    "baseline": "a baseline (--baseline)",
    "reference": "a reference policy (--reference_model_name_or_path)",
    "paper": "a model that reads the texts (--ppl_model_name_or_path)",
    "human": "human responses (--human_responses)",
    "pairs": "preference pairs (--pairs)",
    "policy": "a policy whose likelihoods can be read here",
    "samples": "responses sampled with their token ids and log-probs",
}
"""What a metric may need, in words for messages."""


@dataclass(frozen=True)
class Column:
    """How a metric stands in a table.

    Attributes:
        title: its heading.
        digits: after the point.
        better: "↑", "↓" or "" where neither is better in itself.
        shown: it stands in a table for which no columns are chosen.
        gain: it stands in a table of gains too.
        summary: what the one-line summary of an evaluation calls it; "" = it is not mentioned.
        summary_rank: the summary mentions those of the lowest rank.
        is_relative: it compares with the baseline or the reference, so the summary gives no value
            of the baseline next to it.
    """

    title: str
    digits: int = 2
    better: str = ""
    shown: bool = True
    gain: bool = True
    summary: str = ""
    summary_rank: int = 9
    is_relative: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title} {self.better}".strip()


@dataclass(frozen=True)
class Metric:
    """A metric as a registry holds it, or several that are computed together.

    Attributes:
        columns: name of each value -> how it stands in a table.
        measure: of a row, name -> its values by prompt; a plain number has no interval, None means
            that there is nothing to measure. Where something is left out it counts that in the
            row's `counts`, and it may add `notes`.
        needs: keys of `NEEDS`; it is measured where all are there.
        of: what it depends on: the responses of a row, the tokens of its samples, or the policy
            alone, which is then measured once for all its decodings.
        phase: where its time is counted; "" = nowhere.
        made_with: of a row, what must agree between rows that are compared, besides what it needs.
    """

    columns: Mapping[str, Column]
    measure: Callable[[Draft], Mapping[str, Measure | float | None]]
    needs: tuple[str, ...] = ()
    of: Literal["responses", "samples", "policy"] = "responses"
    phase: str = ""
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [need for need in self.needs if need not in NEEDS]
        assert not unknown, f"a metric may need {', '.join(NEEDS)}; not {', '.join(unknown)}"
