"""Writes models as plain Hugging Face folders, which `from_pretrained` and vLLM can load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rrhf.os_errors import explained_full_disk

# Parts of names in peft: the prefix of the whole model; a layer that has adapters; and, for a layer
# that is trained in full (such as a new head), the original layer and the trained copy.
_WHOLE = "base_model.model."
_WRAPPED = ".base_layer"
_ORIGINAL, _TRAINED = ".original_module.", ".modules_to_save.default."


def write_model_folder(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write weights (safetensors), config, generation config, tokenizer and chat template.

    Args:
        folder: the folder to write; it must exist and be empty.
        model: the Hugging Face model. LoRA adapters are merged into a copy of the weights, and are
            also saved separately in the subfolder `adapter/`.
        tokenizer: the tokenizer of the model.
        state_dict: the full weights, if the model holds shards only.
    """
    needed = sum(t.nbytes for t in (state_dict or dict(model.named_parameters())).values())
    with explained_full_disk(needed):
        if hasattr(model, "merge_and_unload"):
            full = model.state_dict() if state_dict is None else state_dict
            model.save_pretrained(folder / "adapter", state_dict=full)
            model.get_base_model().save_pretrained(folder, state_dict=merged_weights(model, full))
        else:
            model.save_pretrained(folder, state_dict=state_dict)
        if state_dict is not None:
            _name_precision(folder, state_dict)
        tokenizer.save_pretrained(folder)


def _name_precision(folder: Path, state_dict: dict[str, Tensor]) -> None:
    """Correct the dtype in config.json: saved weights may be more precise than the model's."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    finest = max((t.dtype for t in state_dict.values()), key=lambda dtype: dtype.itemsize)
    if "dtype" in config and finest.is_floating_point:
        config["dtype"] = str(finest).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def weights_below(prefix: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the weights whose names begin with a prefix, and remove the prefix."""
    return {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix)
    }


@torch.no_grad()
def merged_weights(model: Any, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Merge LoRA adapters into the weights: W + scale * B A for each layer with adapters.

    Weights are taken from `state_dict` and never from the model, which may hold shards only. The
    model is not changed.

    Args:
        model: a peft model with LoRA.
        state_dict: the full weights of this model.

    Returns:
        Weights on the CPU, under the plain model's names.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "scaling")
    }
    merged: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        if ".lora_" in name or _ORIGINAL in name:
            continue
        plain = name.removeprefix(_WHOLE).replace(_WRAPPED, "").replace(_TRAINED, ".")
        merged[plain] = value.detach().cpu()
        owner, found, kind = name.rpartition(f"{_WRAPPED}.")
        if found and kind == "weight":
            merged[plain] = merged[plain] + _change(layers[owner], owner, state_dict)
    return merged


def _change(layer: Any, name: str, state_dict: dict[str, Tensor]) -> Tensor:
    """Compute scale * B A of one layer, in the shape of the layer's weight ([out, in] or
    transposed)."""
    is_embedding = f"{name}.lora_embedding_A.default" in state_dict
    form = "lora_embedding_{}.default" if is_embedding else "lora_{}.default.weight"
    a, b = (state_dict[f"{name}.{form.format(side)}"].detach().cpu() for side in "AB")
    change = layer.scaling["default"] * (b @ a)
    is_transposed = is_embedding or getattr(layer, "fan_in_fan_out", False)
    return change.T if is_transposed else change
