"""Packed rows give the log-probs and gradients of padded rows, and leaks are noticed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.forward.packed_rows import PackedPolicy, fill_bins, pack_rows, require_packing


def batch(device: str = "cpu") -> TokenBatch:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=generator).tolist()

    shapes = [(7, 4), (1, 1), (12, 9), (3, 2), (1, 6), (5, 1), (2, 14)]
    sets = [EncodedSet(ids(p), [ids(r)]) for p, r in shapes]
    return collate([*sets, EncodedSet(ids(4), [ids(2), ids(5), ids(1)])], pad_id=2).to(device)


def test_bins_hold_every_row_once_and_never_too_much() -> None:
    lengths = [5, 9, 2, 2, 7, 1, 30, 8]
    bins = fill_bins(lengths, 10)
    assert sorted(row for rows in bins for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 10 for rows in bins if rows != [6])
    assert [6] in bins  # longer than a bin: alone
    assert len(bins) == 5  # 30 | 9 1 | 8 2 | 7 2 | 5
    assert len(fill_bins([3, 4, 7, 6], 10)) == 2  # in the order given it would take three


def test_places_point_at_what_they_say() -> None:
    b = batch()
    packed = pack_rows(b, 20)
    flat = packed.ids.flatten()
    seen = set()
    for place, row, column in zip(
        packed.predicted_from.tolist(), packed.row.tolist(), packed.column.tolist(), strict=True
    ):
        prompt = int(b.prompt_index[row])
        length = int(b.prompt_lengths[prompt])
        whole = [*b.prompt_ids[prompt, -length:].tolist(), *b.response_ids[row].tolist()]
        before = whole[: length + column]
        assert flat[place + 1 - len(before) : place + 1].tolist() == before
        assert int(packed.position_ids.flatten()[place]) == len(before) - 1
        seen.add((row, column))
    assert seen == {(n, t) for n, r in enumerate(b.response_lengths.tolist()) for t in range(r)}


def gradient(policy: Policy, b: TokenBatch) -> tuple[Tensor, Tensor]:
    outputs = policy(b)
    # Squares, so that every log-prob weighs differently and a swap would be seen.
    outputs.logprobs.square().sum().backward()
    return outputs.logprobs.detach(), torch.cat(
        [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("width", [1, 20, 64, 1000])
def test_packed_equals_padded(width: int, attention: str) -> None:
    b = batch()
    padded_model, packed_model = tiny_llama(), tiny_llama()
    packed_model.set_attn_implementation(attention)
    logprobs, expected = gradient(Policy(padded_model), b)
    got, packed = gradient(PackedPolicy(packed_model, width), b)
    assert float((got - logprobs).abs().max()) < 2e-5  # sums of |log-prob| <= 20 in float32
    assert bool((got[~b.response_mask] == 0).all())
    assert float((packed - expected).norm() / expected.norm()) < 2e-6


def test_one_bin_mean_logprobs_and_checkpointing() -> None:
    b = batch()
    model = tiny_llama()
    options = LogprobOptions(with_mean_logprobs=True)
    expected = Policy(model, options)(b)
    got = PackedPolicy(model, 20, one_bin=True, options=options)(b)
    assert torch.allclose(got.logprobs, expected.logprobs, atol=2e-5)
    assert torch.allclose(got.mean_logprobs, expected.mean_logprobs, atol=2e-5)
    _, plain = gradient(PackedPolicy(model, 20), b)
    other = tiny_llama().train()
    other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, recomputed = gradient(PackedPolicy(other, 20), b)
    assert float((recomputed - plain).norm() / plain.norm()) < 2e-6


def test_absolute_positions_restart_too() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )
    model = GPT2LMHeadModel(config).eval()
    b = batch()
    expected = Policy(model)(b).logprobs
    assert torch.allclose(PackedPolicy(model, 40)(b).logprobs, expected, atol=2e-5)
    require_packing(PackedPolicy(model, 40))


class Leaking(PackedPolicy):
    """Negative control: what an all-ones mask would do."""

    def __init__(self, model: Any, width: int) -> None:
        super().__init__(model, width)
        inner = model.forward

        def forward(input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
            mask = torch.ones_like(input_ids)
            return inner(
                input_ids=input_ids,
                position_ids=position_ids,
                attention_mask=mask,
                use_cache=use_cache,
            )

        self._forward, self._inner = forward, inner

    def forward(self, b: TokenBatch) -> Any:
        self.model.forward = self._forward  # type: ignore[method-assign]
        try:
            return super().forward(b)
        finally:
            self.model.forward = self._inner  # type: ignore[method-assign]


def test_a_model_whose_rows_see_each_other_is_refused() -> None:
    require_packing(PackedPolicy(tiny_llama(), 64))
    with pytest.raises(UserError, match="see each other"):
        require_packing(Leaking(tiny_llama(), 64))


def test_a_model_without_position_ids_is_refused() -> None:
    class Other(torch.nn.Module):
        def forward(self, input_ids: Tensor) -> None: ...

    with pytest.raises(UserError, match="no position ids"):
        PackedPolicy(Other(), 64)
