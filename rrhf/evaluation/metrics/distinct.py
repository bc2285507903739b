"""How varied the responses are.

distinct-n (Li et al. 2016, arXiv:1510.03055) is the number of different n-grams of words divided by
the number of all n-grams, over all responses together. distinct-n falls with the amount of text, so
compare only rows with the same number of responses of similar length. distinct-n has no interval:
resampling draws some prompts twice, and their words would count as repetition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rrhf.evaluation.metrics.spec import Column, Metric

if TYPE_CHECKING:
    from rrhf.evaluation.draft import Draft


def distinct_n(texts: Sequence[str], n: int) -> float | None:
    """Divide the number of different n-grams of words by that of all n-grams; None without
    n-grams."""
    assert n >= 1, "an n-gram has at least one word"
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else None


def measure(draft: Draft) -> Mapping[str, float | None]:
    """Compute distinct-1 and distinct-2."""
    texts = [response for s in draft.sets for response in s.responses]
    return {f"distinct_{n}": distinct_n(texts, n) for n in (1, 2)}


DISTINCT = Metric(
    {
        "distinct_1": Column("distinct-1", 3, shown=False),
        "distinct_2": Column("distinct-2", 3, gain=False),
    },
    measure,
)
