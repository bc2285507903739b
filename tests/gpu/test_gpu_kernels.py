"""What is taken for granted of kernels: where queries stand, windows, grouped heads, gradients."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_stand_in import flash_attn_varlen_func as exact
from layout_cases import RAGGED, SHAPES
from torch import Tensor

from rrhf.models.forward.flex_attention import attend_flex, block_mask
from rrhf.models.forward.head import token_statistics
from rrhf.models.forward.logit_shape import LogitShape
from rrhf.models.forward.prefix_attention import attend
from rrhf.models.forward.shared_prefix import AttentionRules, lay_out
from rrhf.models.forward.varlen_attention import load_torch_varlen, load_varlen

QUERIES, KEYS = (5, 1, 130, 33), (9, 1, 400, 40)
"""Tokens of each row: more keys than queries, as where a response reads its prompt."""


def rows(device: str, dtype: torch.dtype, heads: int, key_heads: int, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(sum(QUERIES), heads), (sum(KEYS), key_heads), (sum(KEYS), key_heads)]
    return [
        torch.randn(*size, width, generator=generator).to(device, dtype).requires_grad_()
        for size in sizes
    ]


def bounds(device: str) -> list[Any]:
    ends = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=device)
        for lengths in (QUERIES, KEYS)
    ]
    return [*ends, max(QUERIES), max(KEYS)]


def require_exact(kernel: Callable[..., Any], device: str, dtype: torch.dtype, **more: Any) -> None:
    """Against every score written out in float64.

    In half precision scores are float32 sums, and weights and results are rounded to the format:
    eight units of its last place are room for both. In float32 scores are rounded too, and those of
    up to 20 make 20 times as much of it in their exponential: 64 units.
    """
    for heads, key_heads, width in ((4, 4, 64), (8, 2, 64), (4, 1, 128)):
        mine = rows(device, dtype, heads, key_heads, width)
        theirs = [x.detach().double().requires_grad_() for x in mine]
        found = kernel(*mine, *bounds(device), causal=True, **more)
        expected = exact(*theirs, *bounds(device), causal=True, **more)
        weights = torch.arange(found.numel(), device=device).mul(2.4).cos().view_as(found)
        (found * weights.to(dtype)).sum().backward()
        (expected * weights.to(dtype).double()).sum().backward()
        unit = (64 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
        pairs = [(found, expected)]
        pairs += [(x.grad, y.grad) for x, y in zip(mine, theirs, strict=True)]  # type: ignore[misc]
        for mine_is, must_be in pairs:
            off = (mine_is.double() - must_be).norm() / must_be.norm()
            assert float(off.detach()) < unit, (heads, key_heads, width, more, float(off))


MORE: list[dict[str, Any]] = [{}, {"window_size": (7, 0)}, {"softmax_scale": 0.3}]


def test_the_check_itself(device: str) -> None:
    """The slow kernel in float32 passes; one wrong by a token, or by its place, does not."""
    for more in MORE:
        require_exact(exact, device, torch.float32, **more)

    def narrower(*args: Any, window_size: tuple[int, int] = (399, 0), **more: Any) -> Tensor:
        return exact(*args, window_size=(window_size[0] - 1, 0), **more)

    def at_the_first_key(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Tensor:
        """As flash attention before 2.1: keys that are left over stand behind the queries."""
        lengths = zip(QUERIES, KEYS, k.split(KEYS), v.split(KEYS), strict=True)
        seen = [(key[:own], value[:own]) for own, _, key, value in lengths]
        ends = torch.tensor([0, *torch.tensor(QUERIES).cumsum(0)], dtype=torch.int32).to(q.device)
        k, v = (torch.cat(pieces) for pieces in zip(*seen, strict=True))
        return exact(q, k, v, ends, ends, max(QUERIES), max(QUERIES), **more)

    for wrong in (narrower, at_the_first_key):
        with pytest.raises(AssertionError):
            require_exact(wrong, device, torch.float32, window_size=(7, 0))


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_attention_of_torch(more: dict[str, Any], dtype: torch.dtype, cuda: str) -> None:
    if "window_size" in more and torch.__version__ < "2.11":
        pytest.skip("varlen attention of torch 2.10 has no sliding window")
    require_exact(load_torch_varlen(), cuda, dtype, **more)


@pytest.mark.parametrize("more", [{}, {"window_size": (7, 0)}, {"softcap": 2.0}])
def test_varlen_attention_of_flash_attn(more: dict[str, Any], cuda: str) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("the package flash-attn is not installed")
    require_exact(load_varlen(), cuda, torch.bfloat16, **more)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_twice_in_deterministic_mode(deterministic: bool, cuda: str) -> None:
    """Only that mode promises it; without it the call must still work."""
    found = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for _ in range(2):
            mine = rows(cuda, torch.bfloat16, 8, 2, 64)
            load_torch_varlen()(*mine, *bounds(cuda), causal=True).square().sum().backward()
            found.append([x.grad for x in mine])
    finally:
        torch.use_deterministic_algorithms(False)
    if deterministic:
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, 2.0)])
def test_flex_attention(window: int | None, softcap: float | None, device: str) -> None:
    """Forward everywhere; backward on CUDA, which alone has one."""
    for batch in (RAGGED, SHAPES["alone"]):
        layout = lay_out(batch.to(device))
        count = layout.ids.shape[1]
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, heads, count, 64, generator=generator).to(device) for heads in (4, 2, 2)
        )
        for x in (query, key, value):
            x.requires_grad_(device == "cuda")
        mask = block_mask(layout, window)
        rules = AttentionRules(window=window, softcap=softcap)
        found = attend_flex(query, key, value, mask, rules)
        expected = attend(query, key, value, layout, rules)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        if device == "cuda":
            states, both = (query, key, value), (found, expected)
            mine, theirs = (torch.autograd.grad(y.square().sum(), states) for y in both)
            for one, other in zip(mine, theirs, strict=True):
                assert float((one - other).norm() / other.norm()) < 1e-3


@pytest.mark.parametrize("stored_bytes", [0, 1 << 30])
def test_the_head(stored_bytes: int, device: str) -> None:
    """Chunks of the fused head against log-softmax in float64, with its gradients."""
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 5000, bias=False).to(device)
    hidden = torch.randn(300, 64, device=device, requires_grad=True)
    targets = torch.randint(5000, (300,), device=device)
    found = token_statistics(
        hidden, head, targets, LogitShape(), stored_bytes=stored_bytes, chunk_bytes=1 << 18
    ).logprobs
    found.square().sum().backward()
    other = hidden.detach().double().requires_grad_()
    weight = head.weight.detach().double().requires_grad_()
    expected = (other @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected.square().sum().backward()
    assert hidden.grad is not None and head.weight.grad is not None
    assert other.grad is not None and weight.grad is not None
    # A logit is a sum of 64 products: sqrt(64) roundings of the last place, eight for what follows.
    bound = 8 * math.sqrt(64) * torch.finfo(torch.float32).eps
    pairs = ((found, expected), (hidden.grad, other.grad), (head.weight.grad, weight.grad))
    for mine, theirs in pairs:
        assert float(((mine.double() - theirs).norm() / theirs.norm()).detach()) < bound
