"""Encoded prompts and responses as one batch of tensors, ragged in every direction.

B prompts, N rows (every response of every prompt), P prompt tokens, R response tokens. Prompts are
stored once each and padded on the left, responses padded on the right, so that every response
begins at the same column of a full row `[prompt | response]` and a head need only be applied to the
last R + 1 columns. Masks come from lengths alone: a pad id may be a real token elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rrhf.algorithms.masked import length_mask


@dataclass(frozen=True)
class EncodedSet:
    """One prompt and its responses as ids.

    Attributes:
        prompt_ids: at least one id.
        response_ids: one list for each row; each at least one id.
        scores: one number for each row, or None where the task has none.
        weight: 0 makes the prompt a filler that adds nothing to any sum.
        extras: further per-row numbers, by name.
        token_extras: further numbers of every response token, by name: for each row a tensor, or a
            list, as long as the response.
    """

    prompt_ids: Sequence[int]
    response_ids: Sequence[Sequence[int]]
    scores: Sequence[float] | None = None
    weight: float = 1.0
    extras: dict[str, Sequence[float]] = field(default_factory=dict)
    token_extras: dict[str, Sequence[Tensor | Sequence[float]]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens of the padded-rows form: each row carries its prompt."""
        rows = len(self.response_ids)
        return rows * len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


@dataclass(frozen=True)
class TokenBatch:
    """What the one forward interface of every model takes.

    Attributes:
        prompt_ids: [B, P] int64, padded on the left.
        prompt_lengths: [B] int64.
        response_ids: [N, R] int64, padded on the right.
        response_lengths: [N] int64.
        prompt_index: [N] int64, ascending: the prompt of each row.
        prompt_weights: [B] float32; 0 for a filler prompt.
        scores: [N] float32, finite; None where the task has none.
        extras: [N] float32 each.
        token_extras: [N, R] float32 each; 0 at padding.
    """

    prompt_ids: Tensor
    prompt_lengths: Tensor
    response_ids: Tensor
    response_lengths: Tensor
    prompt_index: Tensor
    prompt_weights: Tensor
    scores: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    token_extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_prompts(self) -> int:
        return self.prompt_ids.shape[0]

    @property
    def num_rows(self) -> int:
        return self.response_ids.shape[0]

    @property
    def response_mask(self) -> Tensor:
        """[N, R] True at response tokens."""
        return length_mask(self.response_lengths, self.response_ids.shape[1])

    @property
    def row_weights(self) -> Tensor:
        """[N] the weight of each row's prompt."""
        return self.prompt_weights[self.prompt_index]

    def full_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows `[prompt | response]` in full.

        Returns:
            ids [N, P + R], attention mask [N, P + R] int64, position ids [N, P + R] counted from
            each row's first attended token.
        """
        prompts = self.prompt_ids[self.prompt_index]
        width = prompts.shape[1]
        columns = torch.arange(width, device=prompts.device)
        prompt_mask = columns >= width - self.prompt_lengths[self.prompt_index][:, None]
        ids = torch.cat([prompts, self.response_ids], dim=1)
        mask = torch.cat([prompt_mask, self.response_mask], dim=1).long()
        return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device."""
        moved = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        extras = {name: value.to(device) for name, value in self.extras.items()}
        token_extras = {name: value.to(device) for name, value in self.token_extras.items()}
        return replace(self, **moved, extras=extras, token_extras=token_extras)


def collate(sets: Sequence[EncodedSet], pad_id: int) -> TokenBatch:
    """Encoded sets as one batch; scores are kept only where every set has them."""
    assert sets, "a batch needs at least one prompt"
    assert all(s.prompt_ids and s.response_ids for s in sets), "a set needs a prompt and a response"
    rows = [ids for s in sets for ids in s.response_ids]
    assert all(rows), "a response needs at least its EOS"
    counts = [len(s.response_ids) for s in sets]
    have_scores = all(s.scores is not None for s in sets)
    scores = [score for s in sets for score in s.scores or ()] if have_scores else None
    assert scores is None or len(scores) == len(rows), "one score for each response"
    names = sets[0].extras.keys()
    return TokenBatch(
        prompt_ids=_pad([s.prompt_ids for s in sets], pad_id, left=True),
        prompt_lengths=torch.tensor([len(s.prompt_ids) for s in sets]),
        response_ids=_pad(rows, pad_id, left=False),
        response_lengths=torch.tensor([len(ids) for ids in rows]),
        prompt_index=torch.repeat_interleave(torch.arange(len(sets)), torch.tensor(counts)),
        prompt_weights=torch.tensor([s.weight for s in sets], dtype=torch.float32),
        scores=None if scores is None else torch.tensor(scores, dtype=torch.float32),
        extras={
            name: torch.tensor([v for s in sets for v in s.extras[name]], dtype=torch.float32)
            for name in names
        },
        token_extras={
            name: _pad_numbers([values for s in sets for values in s.token_extras[name]], rows)
            for name in sets[0].token_extras
        },
    )


def padded_groups(values: Tensor, prompt_index: Tensor, num_prompts: int) -> tuple[Tensor, Tensor]:
    """Row values as a grid of prompts by candidates.

    Args:
        values: [N] or [N, ...].
        prompt_index: [N] ascending.
        num_prompts: B.

    Returns:
        [B, K, ...] with zeros where a prompt has fewer than K rows, and [B, K] True where a row is.
    """
    counts = torch.bincount(prompt_index, minlength=num_prompts)
    width = int(counts.max()) if len(prompt_index) else 0
    first = counts.cumsum(0) - counts
    place = torch.arange(len(prompt_index), device=values.device) - first[prompt_index]
    grid = values.new_zeros((num_prompts, width, *values.shape[1:]))
    grid = grid.index_put((prompt_index, place), values)
    return grid, length_mask(counts, width)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> Tensor:
    width = max(len(ids) for ids in rows)
    padded = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        target = row[width - len(ids) :] if left else row[: len(ids)]
        target.copy_(torch.as_tensor(ids, dtype=torch.int64))
    return padded


def _pad_numbers(
    values: Sequence[Tensor | Sequence[float]], rows: Sequence[Sequence[int]]
) -> Tensor:
    """[N, R] float32, aligned with the padded responses."""
    padded = torch.zeros((len(rows), max(len(ids) for ids in rows)), dtype=torch.float32)
    for row, numbers, ids in zip(padded, values, rows, strict=True):
        assert len(numbers) == len(ids), "a token extra has one number for each response token"
        row[: len(ids)] = torch.as_tensor(numbers, dtype=torch.float32)
    return padded
