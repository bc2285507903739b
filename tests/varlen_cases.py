"""Stand-ins for the varlen attention of three versions of torch."""

from __future__ import annotations

from typing import Any

import flash_stand_in
import torch
from torch import Tensor

exact = flash_stand_in.flash_attn_varlen_func


calls: list[torch.dtype] = []


def torch_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    return_aux: Any = None,
) -> Tensor:
    assert is_causal
    calls.append(query.dtype)
    return exact(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, causal=True)


def torch_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    assert window_size[1] == 0, "keys behind the query would be seen"
    calls.append(query.dtype)
    rows = (cu_seq_q, cu_seq_k, max_q, max_k)
    window = (window_size[0], 0)
    return exact(query, key, value, *rows, softmax_scale=scale, causal=True, window_size=window)


def torch_2_13(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rows: Any,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    assert enable_gqa == (query.shape[1] != key.shape[1]), "torch refuses grouped heads unasked"
    return torch_2_11(query, key, value, *rows, scale=scale, window_size=window_size)
