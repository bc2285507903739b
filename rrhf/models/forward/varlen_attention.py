"""Attention over shared prompts by flash attention, in two calls that pad nothing.

Flash attention takes rows of any length laid end to end, but knows no tree. The first call is the
prompts, causally. In the second, each response asks with its own tokens alone and reads its
prompt's keys before its own: where a row has more keys than queries, flash attention (since 2.1)
lets the last query stand at the last key, which is the mask that a response needs. Grouped heads,
sliding windows, soft-capping and dropout are the kernel's own.

There are two kernels. A model loaded with `flash_attention_2` uses the flash-attn package. The
layout `varlen_attention` uses the one inside torch (`torch.nn.attention.varlen`, since 2.10) for a
model loaded with `sdpa`, so it needs no package; it has neither soft-capping nor dropout.

Both run on CUDA in half precision alone; no GPU was at hand here. What is around them (who reads
which keys, lengths, gradients) is the same for any function of flash attention's signature, and
tests put a slow and exact one in its place. Not measured, not run on CUDA.

Legend: T tokens of the sequence, D head width, G prompts, N responses that are fed.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.flash_attention import flash_attention_forward

from rrhf.models.forward.shared_prefix import SharedPrefix

FLASH = "flash_attention_2"
"""What transformers calls the implementation that this one takes the place of."""

LAYOUT = "varlen_attention"
"""The layout that goes by torch's own kernel."""

DEVICES = ("cuda",)
"""Kinds of device that the kernels run on."""

HALF = (torch.bfloat16, torch.float16)
"""What torch's kernel computes in."""

on_attention: Callable[[Sequence[Tensor], SharedPrefix, Sequence[Any]], None] | None = None
"""Is shown query, key and value, layout and settings of attention that SDPA computes: a trial of
the kernel on another device (`rrhf.models.forward.kernel_trial`)."""


@dataclass(frozen=True)
class Calls:
    """The two calls of a layout, in tokens counted prompts first, then responses.

    Attributes:
        prompts: tokens of the first call.
        prompt_bounds: [G + 1] int32, where each prompt begins, and where the last ends.
        longest_prompt: tokens.
        own_bounds: [N + 1] int32, of the responses' own tokens; None where there are none.
        longest_own: tokens.
        key_bounds: [N + 1] int32, of what the responses read.
        longest_keys: tokens.
        keys: [tokens that responses read] which token stands there.
    """

    prompts: int
    prompt_bounds: Tensor
    longest_prompt: int
    own_bounds: Tensor | None
    longest_own: int
    key_bounds: Tensor | None
    longest_keys: int
    keys: Tensor | None


def calls_of(layout: SharedPrefix) -> Calls:
    """The rows of both calls."""
    device = layout.ids.device
    prompts: list[int] = []
    own: list[int] = []
    owners: list[int] = []
    for bucket in layout.buckets:
        if bucket.responses is not None:
            owners += [len(prompts) + owner for owner in bucket.owners]
            own += bucket.responses.lengths
        prompts += bucket.prompts.lengths
    ends = [0, *accumulate(prompts)]

    def bounds(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    if not own:
        return Calls(ends[-1], bounds(prompts), max(prompts), None, 0, None, 0, None)
    read = [prompts[owner] + length for owner, length in zip(owners, own, strict=True)]
    own_ends = accumulate(own, initial=ends[-1])
    starts = [
        start
        for pair in zip((ends[owner] for owner in owners), own_ends, strict=False)
        for start in pair
    ]
    lengths = [
        piece
        for pair in zip((prompts[owner] for owner in owners), own, strict=True)
        for piece in pair
    ]
    return Calls(
        prompts=ends[-1],
        prompt_bounds=bounds(prompts),
        longest_prompt=max(prompts),
        own_bounds=bounds(own),
        longest_own=max(own),
        key_bounds=bounds(read),
        longest_keys=max(read),
        keys=_pieces(torch.tensor(starts), torch.tensor(lengths)).to(device),
    )


def _pieces(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers from each start on, as many as its length, one piece behind the other."""
    before = lengths.cumsum(0) - lengths
    return torch.repeat_interleave(starts - before, lengths) + torch.arange(int(lengths.sum()))


def attend_varlen(
    states: Sequence[Tensor],
    layout: SharedPrefix,
    calls: Calls,
    varlen: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of the whole sequence, as `prefix_attention.attend`.

    Args:
        states: query [1, heads, T, D]; key and value [1, key heads, T, D].
        layout: of the sequence.
        calls: of the layout.
        varlen: a function of the signature of flash_attn.flash_attn_varlen_func.
        scaling: of the scores; None = 1 / sqrt(D).
        dropout: of the attention weights.
        window: how many positions back a token sees, itself included; None = all.
        softcap: bound of the scores, or None.

    Returns:
        [1, T, heads, D].
    """

    def call(rows: list[Tensor], bounds: list[Tensor], longest: list[int]) -> Tensor:
        more: dict[str, Any] = {}
        if window is not None and longest[1] > window:
            more["window_size"] = (window - 1, 0)  # how many keys on either side of its own
        if softcap is not None:
            more["softcap"] = softcap
        if torch.are_deterministic_algorithms_enabled():
            more["deterministic"] = True
        found = varlen(
            *rows,
            *bounds,
            *longest,
            dropout_p=dropout,
            softmax_scale=scaling,
            causal=True,
            **more,
        )
        whole: Tensor = found[0] if isinstance(found, tuple) else found
        return whole

    # [T, heads, D], prompts first
    q, k, v = (_prompts_first(x[0].transpose(0, 1), layout) for x in states)
    count, bounds = calls.prompts, calls.prompt_bounds
    outputs = [call([q[:count], k[:count], v[:count]], [bounds] * 2, [calls.longest_prompt] * 2)]
    if calls.keys is not None:
        assert calls.own_bounds is not None and calls.key_bounds is not None
        rows = [q[count:], _Read.apply(k, calls.keys), _Read.apply(v, calls.keys)]
        both = [calls.own_bounds, calls.key_bounds]
        outputs.append(call(rows, both, [calls.longest_own, calls.longest_keys]))
    return _as_laid(torch.cat(outputs), layout)[None]


def _order(layout: SharedPrefix) -> list[int]:
    """The parts of the sequence, those that hold prompts first."""
    prompts: list[int] = []
    responses: list[int] = []
    for bucket in layout.buckets:
        prompts.append(len(prompts) + len(responses))
        if bucket.responses is not None:
            responses.append(len(prompts) + len(responses))
    return prompts + responses


def _prompts_first(tokens: Tensor, layout: SharedPrefix) -> Tensor:
    if len(layout.buckets) == 1:
        return tokens
    parts = tokens.split(layout.sizes)
    return torch.cat([parts[place] for place in _order(layout)])


def _as_laid(tokens: Tensor, layout: SharedPrefix) -> Tensor:
    if len(layout.buckets) == 1:
        return tokens
    order = _order(layout)
    parts = tokens.split([layout.sizes[place] for place in order])
    return torch.cat([parts[order.index(place)] for place in range(len(order))])


class _Read(torch.autograd.Function):
    """Tokens at places, some of them many times; what comes back to one is summed in float32."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(tokens)
        return tokens.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        whole = gradient.new_zeros((ctx.count, *gradient.shape[1:]), dtype=torch.float32)
        return whole.index_add_(0, places, gradient.float()).to(gradient.dtype), None


def load_varlen() -> Any:
    """The kernel."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def torch_varlen_missing() -> str | None:
    """Why torch's kernel cannot be used on this machine; None where it can."""
    if "cuda" in DEVICES and not torch.cuda.is_available():
        return "needs a CUDA GPU and none is visible"
    return None


def serves(states: Sequence[Tensor]) -> bool:
    """Whether torch's kernel takes these; elsewhere the two calls are SDPA's."""
    return states[0].device.type in DEVICES and states[0].dtype in HALF


@functools.cache
def load_torch_varlen() -> Any:
    """The kernel inside torch, called as flash-attn's is."""
    from torch.nn.attention.varlen import varlen_attn

    return as_flash(varlen_attn)


def as_flash(varlen_attn: Callable[..., Any]) -> Callable[..., Tensor]:
    """Gives a `varlen_attn` the signature of flash_attn.flash_attn_varlen_func.

    torch's changed twice: 2.10 has `is_causal` and no scale, 2.11 says with `window_size` that
    attention is causal, 2.12 wants to be told of grouped heads (which the kernel always had).
    """
    known = inspect.signature(varlen_attn).parameters

    def call(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rows: Any,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = True,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        deterministic: bool = False,  # torch's kernel asks torch by itself
    ) -> Tensor:
        assert causal, "nothing here asks for attention to later tokens"
        if dropout_p or softcap:
            raise NotImplementedError("torch's varlen attention has no dropout and no soft-capping")
        more: dict[str, Any] = {}
        if "window_size" in known:
            more["window_size"] = (window_size[0], 0)
        elif window_size[0] >= 0:
            raise NotImplementedError(
                f"varlen attention of torch {torch.__version__} has no sliding window; 2.11 has"
            )
        else:
            more["is_causal"] = True
        usual = query.shape[-1] ** -0.5
        if "scale" in known:
            more["scale"] = softmax_scale
        elif softmax_scale is not None and not math.isclose(softmax_scale, usual):
            query = query * (softmax_scale / usual)
        if "enable_gqa" in known:
            more["enable_gqa"] = query.shape[1] != key.shape[1]
        found: Tensor = varlen_attn(query, key, value, *rows, **more)
        return found

    return call


def in_one_precision(*tensors: Tensor) -> list[Tensor]:
    """Query, key and value as kernels take them: norms of queries may have left float32."""
    dtype, device = tensors[-1].dtype, tensors[-1].device.type
    if dtype == torch.float32 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) for x in tensors]


def ordinary_flash(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """What transformers does for flash attention where no prompt is shared.

    It looks its kernels up by the name in the module's config, and would not know ours.
    """
    config = _Instead(module.config, _attn_implementation=FLASH)
    found: tuple[Tensor, Tensor | None] = flash_attention_forward(
        _Instead(module, config=config),  # type: ignore[arg-type]
        *args,
        **kwargs,
    )
    return found


class _Instead:
    """An object as it is, but for these attributes."""

    def __init__(self, inner: Any, **attributes: Any) -> None:
        vars(self).update(attributes, _inner=inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
