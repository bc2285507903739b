"""Flash attention's functions, slow and exact, so that what is around the kernel runs on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_flash_attention_utils
from transformers.integrations import flash_attention

from rrhf.models.forward import varlen_attention


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Row by row, head by head: the last query of a row stands at its last key.

    Also insists on what the kernel would not notice: bounds that cover everything, in int32, and
    the longest row.
    """
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(cu_seqlens_q) == len(cu_seqlens_k)
    assert int(cu_seqlens_q[-1]) == len(q) and int(cu_seqlens_k[-1]) == len(k) == len(v)
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
    assert int(cu_seqlens_k.diff().max()) == max_seqlen_k
    assert causal and dropout_p == 0 and not deterministic
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    shared = q.shape[1] // k.shape[1]
    rows = []
    ends = (cu_seqlens_q.tolist(), cu_seqlens_k.tolist())
    for q0, q1, k0, k1 in zip(ends[0], ends[0][1:], ends[1], ends[1][1:], strict=False):
        assert k1 - k0 >= q1 - q0 > 0
        heads = []
        for head in range(q.shape[1]):
            scores = scale * q[q0:q1, head] @ k[k0:k1, head // shared].T
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            for i in range(q1 - q0):
                at = i + (k1 - k0) - (q1 - q0)
                sees = torch.arange(k1 - k0) <= at
                if window_size[0] >= 0:
                    sees &= torch.arange(k1 - k0) >= at - window_size[0]
                heads.append(
                    scores[i].masked_fill(~sees, -torch.inf).softmax(-1) @ v[k0:k1, head // shared]
                )
        rows.append(torch.stack(heads).unflatten(0, (q.shape[1], q1 - q0)).transpose(0, 1))
    return torch.cat(rows)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
    """[rows, tokens, heads, D] each, every row as long as the others."""

    def bounds(x: Tensor) -> Tensor:
        return torch.arange(len(x) + 1, dtype=torch.int32) * x.shape[1]

    sizes = (q.shape[1], k.shape[1])
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    found = flash_attn_varlen_func(*flat, bounds(q), bounds(k), *sizes, **kwargs)
    return found.unflatten(0, q.shape[:2])


def install(patch: pytest.MonkeyPatch) -> None:
    """For transformers and for us."""
    utils = modeling_flash_attention_utils
    functions = (
        flash_attn_func,
        flash_attn_varlen_func,
        None,
        utils._pad_input,
        utils._unpad_input,
    )

    def import_them(implementation: str, *_: Any, **__: Any) -> Any:
        assert implementation == "flash_attention_2", "transformers knows no other"
        return functions

    patch.setattr(utils, "_loaded_implementation", None)
    patch.setattr(utils, "_lazy_imports", import_them)
    # It looks for a linear layer's type where queries are in float32; GPT-2 has none.
    patch.setattr(flash_attention, "get_target_dtype", lambda *_: None)
    patch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    patch.setattr(varlen_attention, "load_varlen", lambda: flash_attn_varlen_func)
    patch.setattr(varlen_attention, "DEVICES", ("cpu",))


def with_flash(model: PreTrainedModel) -> PreTrainedModel:
    """As if the model had been loaded with flash attention."""
    model.config._attn_implementation_internal = "flash_attention_2"
    return model
