"""Tells whether a model samples faster in bfloat16 than in float32 on this machine."""

from __future__ import annotations

import torch
from transformers import AutoConfig

from rrhf.model_paths import model_folder
from rrhf.models.forward.onednn_linear import has_bfloat16
from rrhf.models.loading import resolve_device

LEAST_WIDTH = 256
"""The smallest hidden size with which bfloat16 is faster on a CPU. In narrower models, converting
and calling cost more than smaller weights save."""


def samples_faster_in_bfloat16(name_or_path: str) -> bool:
    """Return whether a model that this process loads samples faster in bfloat16.

    Args:
        name_or_path: the model; False if its config cannot be read.
    """
    if resolve_device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if not has_bfloat16():
        return False
    try:
        config = AutoConfig.from_pretrained(model_folder(name_or_path))
    except (OSError, ValueError):  # whoever loads the model says what is wrong
        return False
    return int(getattr(config.get_text_config(), "hidden_size", 0) or 0) >= LEAST_WIDTH
