"""The RRHF paper's perplexity of bare texts under a model of its own.

`ppl_paper` is the paper's column (section 4, and its authors' word on their script): the
response alone, line breaks as blanks, stripped, after BOS, under another model (gpt2-medium),
cut after some tokens (most likely 19), 2 ** (mean of *nats*) for each text, mean
over texts. `ppl_paper_e` is the same with e instead of 2, as a perplexity should have it. Neither
is comparable with the perplexities of `rrhf.evaluation.metrics.perplexity`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rrhf.evaluation.measure import Measure
from rrhf.evaluation.metrics.spec import Column, Metric

if TYPE_CHECKING:
    from rrhf.evaluation.draft import Draft


def measure(draft: Draft) -> Mapping[str, Measure]:
    """Both bases, of a row's responses."""
    assert draft.shared.paper is not None
    return draft.shared.paper.measures(draft.sets)


PPL_PAPER = Metric(
    {
        "ppl_paper": Column("ppl_paper", better="↓", gain=False),
        "ppl_paper_e": Column("ppl_paper_e", better="↓", shown=False),
    },
    measure,
    needs=("paper",),
    phase="likelihoods",
)
