"""Loads reward models in trlX's published layout (keys `transformer.*` and `v_head.weight`).

That layout is a GPT-J (or GPT-2, GPT-Neo) trunk with a linear head under another name. Once the
head is renamed, the weights fit the classifier that transformers has for that family, so no extra
model class is needed. Weights are read from `.safetensors`, `.pt` or `.bin` files, whole or in
shards; `.pt` and `.bin` are read with `weights_only=True`, so that a file cannot run code. If the
published folder holds only weights, config and tokenizer come from the base model's folder.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from rrhf.errors import UserError
from rrhf.models.loading import DTYPES, disable_dropout
from rrhf.models.reward_folders import config_folder, weight_files
from rrhf.models.reward_model import HEAD

PUBLISHED_HEAD = "v_head."
# Attention masks that old versions of these models stored in the weight files.
_STORED_BUFFERS = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")


def load_trlx_reward_model(
    path: str | Path, base: str | Path | None = None, dtype: str = "float32"
) -> Any:
    """Load a published reward model as a transformers classifier with one label, in eval mode.

    Args:
        path: the published folder, or one weight file.
        base: a folder with the base model's config.json, if `path` holds none.
        dtype: a key of `DTYPES`.

    Raises:
        UserError: weights or config are missing, or the weights do not fit the config.
    """
    files = weight_files(path)
    config = AutoConfig.from_pretrained(str(config_folder(path, base)))
    config.num_labels = 1
    config.id2label, config.label2id = {0: HEAD}, {HEAD: 0}
    config.problem_type = "regression"
    try:
        model: Any = AutoModelForSequenceClassification.from_config(config, dtype=DTYPES[dtype])
    except ValueError as error:
        raise UserError(
            f"{path}: --reward_format trlx: a {config.model_type} has no classifier: {error}"
        ) from error
    wanted = set(model.state_dict())
    found: set[str] = set()
    for file in files:
        for name, value in _renamed(_read_weights(file)):
            if name not in wanted:
                raise UserError(
                    f"{file}: --reward_format trlx: holds {name!r}, a key that a trlx reward "
                    f"model of type {config.model_type} does not have (its keys are transformer.* "
                    "and v_head.weight); leave out --reward_format if transformers wrote the folder"
                )
            _copy(model, name, value, file)
            found.add(name)
    if missing := sorted(wanted - found):
        what = "a reward model without a head: v_head.weight" if HEAD in missing[0] else missing[0]
        raise UserError(
            f"{path}: --reward_format trlx: {len(missing)} weights are missing (first: {what}); "
            "copy all files of the published model, or check the base model's config"
        )
    disable_dropout(model)
    return model.eval()


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{file}: cannot be read as plain weights; objects other than tensors are refused, "
            f"because they could run code ({str(error).splitlines()[0][:200]})"
        ) from error
    weights = loaded.get("module", loaded.get("state_dict", loaded)) if loaded else loaded
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(
            f"{file}: does not hold a dictionary of weights; name the file of the model's weights"
        )
    return weights


def _renamed(weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        if _STORED_BUFFERS.search(name) and value.ndim != 1:
            continue
        if name.startswith(PUBLISHED_HEAD):
            yield f"{HEAD}.{name.removeprefix(PUBLISHED_HEAD)}", value
        else:
            yield name, value


@torch.no_grad()
def _copy(model: Any, name: str, value: Tensor, file: Path) -> None:
    target = model.get_parameter(name)
    if target.shape != value.shape:
        raise UserError(
            f"{file}: {name} has shape {tuple(value.shape)} but the config needs "
            f"{tuple(target.shape)}; use the config.json of the model from which it was trained"
        )
    target.copy_(value)
