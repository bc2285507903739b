"""Three quantities that are all called perplexity, each under its own name.

- `ppl_reference`: the policy's responses under the reference policy, given the prompt:
  exp(nats / tokens) over all responses. How natural its responses still are.
- `ppl_human`: held-out human responses under the policy, given the prompt, likewise. How
  much of the language the policy has kept.
- `ppl_paper`: the RRHF paper's column (section 4, and its authors' word on their script): the
  response alone, line breaks as blanks, stripped, after BOS, under another model (gpt2-medium),
  cut after some tokens (most likely 19), 2 ** (mean of *nats*) for each text, mean
  over texts. `ppl_paper_e` is the same with e instead of 2, as a perplexity should have it.

They are not comparable with each other. In the first two a response is its text as the codec
encodes it, so that sampled and written responses are read alike; its EOS is a token like the
others, and a response without any token counts nowhere.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import Measure
from rrhf.evaluation.likelihoods import LikelihoodReader, Row, RowKey, read_logprobs
from rrhf.records import Candidate, CandidateSet

logger = logging.getLogger(__name__)


def perplexity_measure(
    prompt_ids: Sequence[str], nats: Sequence[float], tokens: Sequence[int]
) -> Measure:
    """exp(total nats / total tokens), gathered by prompt.

    Args:
        prompt_ids: the prompt of each response.
        nats: [N] minus the log-prob of each response.
        tokens: [N] how many tokens that sum has.
    """
    total_nats: dict[str, float] = defaultdict(float)
    total_tokens: dict[str, float] = defaultdict(float)
    for prompt_id, more, count in zip(prompt_ids, nats, tokens, strict=True):
        total_nats[prompt_id] += more
        total_tokens[prompt_id] += count
    return Measure(dict(total_nats), dict(total_tokens), "exp")


def response_perplexity(
    reader: LikelihoodReader,
    sets: Sequence[CandidateSet],
    known: dict[RowKey, Tensor] | None = None,
) -> tuple[Measure, int]:
    """Perplexity of every candidate under a model, given its prompt.

    Args:
        reader: the model.
        sets: prompts with candidates.
        known: what was read from these weights before, as `LikelihoodReader.read` keeps it.

    Returns:
        The measure, and how many candidates did not fit into the model's window.
    """
    pairs: list[tuple[CandidateSet, Candidate]] = [(s, c) for s in sets for c in s.candidates]
    encoded = [(s.id, reader.encode(s, candidate)) for s, candidate in pairs]
    rows: list[Row] = [row for _, row in encoded if row is not None]
    logprobs = reader.read(rows, known=known)
    measure = perplexity_measure(
        [prompt_id for prompt_id, row in encoded if row is not None],
        [-float(values.double().sum()) for values in logprobs],
        [len(values) for values in logprobs],
    )
    return measure, len(encoded) - len(rows)


class PaperPerplexity:
    """The RRHF paper's perplexity of bare texts under a model of its own.

    Attributes:
        name: what results call the model.
        max_tokens: texts are cut after so many; None = at the model's window.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        max_tokens: int | None = None,
        name: str = "",
        engine: str = "auto",
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
        if max_tokens is not None and max_tokens < 1:
            raise UserError(f"ppl_max_tokens {max_tokens}: must be at least 1")
        self.model = model
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.name = name or str(tokenizer.name_or_path)
        self._bos = int(bos)
        self._window = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 30)

    def mean_nats(self, texts: Sequence[str]) -> list[float | None]:
        """Nats per token of each text; None where the text has no token at all."""
        limit = min(self.max_tokens or self._window, self._window - 1)
        rows: list[Row] = []
        for text in texts:
            # The script gives an empty text one blank, so that there is something to read.
            cleaned = clean_for_paper(text) or " "
            ids = self.tokenizer(
                cleaned, add_special_tokens=False, split_special_tokens=True
            ).input_ids
            rows.append(([self._bos], ids[:limit]))
        read = read_logprobs(self.model, rows, self._bos, engine=self.engine)
        return [-float(values.double().mean()) if len(values) else None for values in read]

    def measures(self, sets: Sequence[CandidateSet]) -> dict[str, Measure]:
        """`ppl_paper` (base 2) and `ppl_paper_e`, a prompt's texts averaged first."""
        flat = self.mean_nats([c.response for s in sets for c in s.candidates])
        nats = iter(flat)
        by_prompt: dict[str, list[float]] = {}
        for s in sets:
            found = [next(nats) for _ in s.candidates]
            known = [value for value in found if value is not None]
            if known:
                by_prompt[s.id] = known
        return paper_measures(by_prompt)


def paper_measures(mean_nats: Mapping[str, Sequence[float]]) -> dict[str, Measure]:
    """Perplexities with base 2 and base e, from the mean nats of each prompt's texts."""
    two = {i: float(np.mean(np.exp2(np.asarray(v)))) for i, v in mean_nats.items()}
    e = {i: float(np.mean(np.exp(np.asarray(v)))) for i, v in mean_nats.items()}
    return {"ppl_paper": Measure(two), "ppl_paper_e": Measure(e)}


def clean_for_paper(text: str) -> str:
    """Line breaks as blanks, ends stripped."""
    return text.replace("\n", " ").strip()
