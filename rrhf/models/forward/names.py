"""The names of the layouts, which flags read without importing torch."""

from __future__ import annotations

from typing import Literal, get_args

Layout = Literal[
    "auto", "shared_prefix", "varlen_attention", "flex_attention", "dense_mask", "padded"
]
LAYOUTS: tuple[str, ...] = get_args(Layout)
