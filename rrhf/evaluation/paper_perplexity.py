"""Perplexity of texts without their prompts, as in the RRHF paper.

`rrhf.evaluation.metrics.paper_perplexity` gives the definition.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rrhf.errors import UserError
from rrhf.evaluation.likelihoods import Row, read_logprobs
from rrhf.evaluation.measure import Measure
from rrhf.records import CandidateSet

logger = logging.getLogger(__name__)


class PaperPerplexity:
    """Computes the RRHF paper's perplexity of texts.

    Attributes:
        name: name of the model in results.
        max_tokens: texts are cut after this many tokens; None = at the model's window.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_tokens: int | None = None,
        name: str = "",
        layout: str = "auto",
    ) -> None:
        bos = tokenizer.bos_token_id
        if bos is None:
            bos = tokenizer.eos_token_id
            logger.info("%s: no BOS token; texts begin after EOS instead", tokenizer.name_or_path)
        if bos is None:
            raise UserError(
                f"{tokenizer.name_or_path}: has neither BOS nor EOS, so the first token of a text "
                "would have no probability; choose another ppl_model_name_or_path"
            )
        self.model = model
        self.layout = layout
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.name = name or str(tokenizer.name_or_path)
        self._bos = int(bos)
        self._window = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)

    def mean_nats(self, texts: Sequence[str]) -> list[float | None]:
        """Compute the nats per token of each text; None for a text without a token."""
        limit = min(self.max_tokens or self._window, self._window - 1)
        rows: list[Row] = []
        for text in texts:
            # As in the paper's script, an empty text becomes one blank.
            cleaned = clean_for_paper(text) or " "
            ids = self.tokenizer(
                cleaned, add_special_tokens=False, split_special_tokens=True
            ).input_ids
            rows.append(([self._bos], ids[:limit]))
        read = read_logprobs(self.model, rows, self._bos, layout=self.layout)
        return [-float(values.double().mean()) if len(values) else None for values in read]

    def measures(self, sets: Sequence[CandidateSet]) -> dict[str, Measure]:
        """Compute `ppl_paper` (base 2) and `ppl_paper_e`, averaged over the texts of each
        prompt."""
        nats = iter(self.mean_nats([response for s in sets for response in s.responses]))
        found = {s.id: [next(nats) for _ in s.candidates] for s in sets}
        known = {key: [x for x in values if x is not None] for key, values in found.items()}
        return paper_measures({key: values for key, values in known.items() if values})


def paper_measures(mean_nats: Mapping[str, Sequence[float]]) -> dict[str, Measure]:
    """Compute perplexities with base 2 and base e from the mean nats of each prompt's texts."""
    two = {i: float(np.mean(np.exp2(np.asarray(v)))) for i, v in mean_nats.items()}
    e = {i: float(np.mean(np.exp(np.asarray(v)))) for i, v in mean_nats.items()}
    return {"ppl_paper": Measure(two), "ppl_paper_e": Measure(e)}


def clean_for_paper(text: str) -> str:
    """Replace line breaks by blanks, and strip white space at both ends."""
    return text.replace("\n", " ").strip()
