"""Computes log-probs of given responses: the basis of perplexity, KL and p_i accuracy.

Rows go through the forward interface (`rrhf.models.forward.logprobs.Policy`). Rows with the same
prompt go together, so that the prompt's tokens pass through the network once. A model that needs
padded rows gets batches of similar length, whose size depends on the vocabulary, because logits
take most of the memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.models.eval_mode import eval_mode
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.forward.onednn_linear import fast_linears
from rrhf.models.loading import context_window
from rrhf.progress import Progress
from rrhf.records import Candidate, CandidateSet
from rrhf.scoring.row_groups import batches_of, group_batch, group_by

MAX_LOGITS = 1 << 26  # 256 MiB in float32; at the peak, a few copies are in memory
MAX_BATCH_TOKENS = 1 << 14

Row = tuple[Sequence[int], Sequence[int]]  # prompt ids, response ids
RowKey = tuple[tuple[int, ...], tuple[int, ...]]


def read_logprobs(
    model: Any,
    rows: Sequence[Row],
    pad_id: int,
    temperature: float = 1.0,
    layout: str = "auto",
    max_logits: int = MAX_LOGITS,
) -> list[Tensor]:
    """Compute log P(token | prompt, earlier tokens) of every response token.

    Args:
        model: a Hugging Face causal language model; it is put into eval mode during the call.
        rows: prompts (at least one id) and responses (possibly empty).
        pad_id: token id for padding.
        temperature: divides the logits.
        layout: as in `rrhf.models.forward.layouts.build_policy`.
        max_logits: maximum number of elements in the logits of a batch of padded rows.

    Returns:
        For each row, the log-probs [T] float32 in nats, on the CPU.

    Raises:
        UserError: the layout does not support the model.
    """
    read: list[Tensor] = [torch.zeros(0)] * len(rows)
    device = next(model.parameters()).device
    policy = _policy(model, temperature, layout)
    progress = Progress("likelihoods", len(rows), "response")
    with eval_mode(model), torch.inference_mode(), progress, fast_linears(model):
        for places, batch in _batches(policy, rows, pad_id, max_logits):
            logprobs = policy(batch.to(device)).logprobs.cpu()
            for place, values in zip(places, logprobs, strict=True):
                read[place] = values[: len(rows[place][1])].clone()
            progress.advance(len(places))
    return read


_found: WeakKeyDictionary[Any, dict[str, tuple[str, int | None]]] = WeakKeyDictionary()
"""Layout and window of each model, so that each model is checked and reported only once."""


def _policy(model: Any, temperature: float, asked: str) -> Policy:
    """Put the model behind the forward interface, with a layout that supports it."""
    layouts = _found.setdefault(model, {})
    if asked not in layouts:
        with _frozen(model):  # without training, the self-check needs no backward pass
            tried = build_policy(model, asked)
        found: tuple[str, int | None] = ("padded", None)
        if isinstance(tried, FastPolicy):
            found = (tried.layout, tried.window)
        layouts[asked] = found
    layout, window = layouts[asked]
    if layout == "padded":
        return Policy(model, LogprobOptions(temperature))
    policy = FastPolicy(model, layout, LogprobOptions(temperature))
    policy.window = window
    return policy


@contextlib.contextmanager
def _frozen(model: Any) -> Iterator[None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _batches(
    policy: Policy, rows: Sequence[Row], pad_id: int, max_logits: int
) -> Iterator[tuple[Sequence[int], TokenBatch]]:
    """Yield batches of the rows that have a response, with the indices of these rows."""
    places = [place for place, (_, response) in enumerate(rows) if len(response)]
    window = 0.0
    if isinstance(policy, FastPolicy) and policy.layout != "rows":
        # Rows longer than the layout's window are computed as padded rows.
        window = math.inf if policy.window is None else policy.window
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    vocabulary = int(policy.model.config.vocab_size)
    padded = [place for place in places if lengths[place] > window]
    for batch in _padded(rows, padded, vocabulary, max_logits):
        encoded = [EncodedSet(rows[place][0], [rows[place][1]]) for place in batch]
        yield batch, collate(encoded, pad_id)
    grouped = [place for place in places if lengths[place] <= window]
    whole = [[*rows[place][0], *rows[place][1]] for place in grouped]
    groups = group_by(whole, [len(rows[place][0]) for place in grouped])
    by_mask = getattr(policy, "layout", None) == "dense_mask"
    device = next(policy.parameters()).device
    for parts in batches_of(groups, whole, MAX_BATCH_TOKENS, by_mask, device):
        batch = [grouped[place] for part in parts for place in part.places]
        yield batch, group_batch(parts, whole, pad_id, torch.device("cpu"))


def _padded(
    rows: Sequence[Row], places: list[int], vocabulary: int, max_logits: int
) -> list[list[int]]:
    """Split the rows at `places` into batches that fit when padded, longest rows first."""
    places.sort(key=lambda place: -(len(rows[place][0]) + len(rows[place][1])))
    batches: list[list[int]] = []
    batch: list[int] = []
    widest_prompt = widest_response = 0
    for place in places:
        prompt = max(widest_prompt, len(rows[place][0]))
        response = max(widest_response, len(rows[place][1]))
        count = len(batch) + 1
        fits = (
            count * response * vocabulary <= max_logits
            and count * (prompt + response) <= MAX_BATCH_TOKENS
        )
        if batch and not fits:
            batches.append(batch)
            batch, prompt, response = [], len(rows[place][0]), len(rows[place][1])
        batch.append(place)
        widest_prompt, widest_response = prompt, response
    return [*batches, batch] if batch else batches


def row_key(row: Row) -> RowKey:
    """Turn a row into a key for a dict."""
    return tuple(row[0]), tuple(row[1])


class LikelihoodReader:
    """Computes log-probs of responses under a model.

    Attributes:
        model: the Hugging Face model.
        codec: turns the model's text into ids and back.
        name: the model's name in results.
    """

    def __init__(
        self,
        model: Any,
        codec: ChatCodec,
        name: str = "",
        layout: str = "auto",
    ) -> None:
        self.model = model
        self.codec = codec
        self.name = name or str(getattr(model.config, "name_or_path", "") or "model")
        self.layout = layout
        self._window = context_window(model)

    def encode(self, s: CandidateSet, candidate: Candidate) -> Row | None:
        """Encode prompt and response; the prompt loses its oldest turns if the window is too short.

        Returns:
            The ids of both; None if they do not fit even without the oldest turns.
        """
        response = self.codec.encode_response(s, candidate.response, candidate.finish_reason)
        room = None if self._window is None else self._window - len(response)
        if room is not None and room < 1:
            return None
        prompt = self.codec.encode_prompt(s, room)
        return (prompt, response) if prompt else None

    def fits(self, row: Row) -> bool:
        """Whether prompt and response fit into the model's window."""
        return self._window is None or len(row[0]) + len(row[1]) <= self._window

    def read(
        self,
        rows: Sequence[Row],
        temperature: float = 1.0,
        known: dict[RowKey, Tensor] | None = None,
    ) -> list[Tensor]:
        """Compute what `read_logprobs` computes, but equal rows only once.

        Args:
            rows: prompts and responses.
            temperature: divides the logits.
            known: log-probs that were computed before with the same weights and temperature. They
                are reused; new log-probs are added.
        """
        known = {} if known is None else known
        keys = [row_key(row) for row in rows]
        new = [key for key in dict.fromkeys(keys) if key not in known]
        read = read_logprobs(self.model, new, self.codec.pad_id, temperature, self.layout)
        known.update(zip(new, read, strict=True))
        return [known[key] for key in keys]

    def has_vocabulary_of(self, codec: ChatCodec) -> bool:
        """Whether both codecs give the same ids to the same tokens, so that log-probs can be
        compared."""
        return bool(self.codec.tokenizer.get_vocab() == codec.tokenizer.get_vocab())
