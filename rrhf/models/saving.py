"""The policy folder: a plain Hugging Face folder that `from_pretrained` and vLLM load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Where peft keeps a layer that is trained in full, such as a new head, beside its original.
_TRAINED_COPY = ".modules_to_save.default."


def write_model_folder(
    folder: Path,
    model: PreTrainedModel | Any,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (safetensors), config, generation config, tokenizer and chat template.

    Args:
        folder: exists and is empty.
        model: the Hugging Face model; with LoRA the adapters are merged into a copy of the
            weights, and stand alone in `adapter/` beside.
        tokenizer: of the model.
        state_dict: full weights, where the model itself holds shards only.
    """
    if hasattr(model, "merge_and_unload"):
        model.save_pretrained(folder / "adapter")
        _write_merged(folder, model)
    else:
        model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


def _write_merged(folder: Path, model: Any) -> None:
    """Merge, write, and take the adapters out again: the model can train on."""
    model.merge_adapter()
    try:
        base = model.get_base_model()
        merged = {
            name.replace(".base_layer", "").replace(_TRAINED_COPY, "."): value
            for name, value in base.state_dict().items()
            if "lora_" not in name and ".original_module." not in name
        }
        base.save_pretrained(folder, state_dict=merged)
    finally:
        model.unmerge_adapter()
