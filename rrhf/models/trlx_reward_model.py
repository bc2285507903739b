"""Reward models in trlX's published layout (keys `transformer.*` and `v_head.weight`), as ours.

That layout is a GPT-J (or GPT-2, GPT-Neo) trunk with a linear head under another name, so its
weights fit transformers' own classifier of that family once the head is renamed; nothing needs a
class of its own. Weights are read from `.safetensors`, `.pt` or `.bin`, whole or in shards, the
latter with `weights_only=True`, so that a file cannot run code. The published folder holds weights
alone: config and tokenizer then come from the base model's folder.
"""

from __future__ import annotations

import json
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
from rrhf.model_paths import model_folder
from rrhf.models.loading import DTYPES, disable_dropout
from rrhf.models.reward_model import HEAD

PUBLISHED_HEAD = "v_head."
_SUFFIXES = (".safetensors", ".pt", ".bin")
# Masks that old versions of these models stored beside their weights.
_STORED_BUFFERS = re.compile(r"\.attn(\.attention)?\.(masked_)?bias$")


def load_trlx_reward_model(
    path: str | Path, base: str | Path | None = None, dtype: str = "float32"
) -> Any:
    """The published layout as a transformers classifier with one label, in eval mode.

    Args:
        path: the folder, or one weight file.
        base: a folder with the base model's config.json, where `path` holds none.
        dtype: a key of `DTYPES`.

    Raises:
        UserError: no weights, no config, or weights that do not fit one another.
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
                    f"{file}: --reward_format trlx: holds {name!r}, which a reward model of "
                    f"type {config.model_type} with keys transformer.* and v_head.weight does not; "
                    "a folder written by transformers needs no --reward_format"
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


def config_folder(path: str | Path, base: str | Path | None) -> Path:
    """Where config.json (and the tokenizer) stands: beside the weights, or with the base model.

    Raises:
        UserError: in neither place.
    """
    place = Path(model_folder(path))
    beside = place if place.is_dir() else place.parent
    for folder in (Path(model_folder(base)),) if base is not None else (beside,):
        if (folder / "config.json").is_file():
            return folder
    if base is not None:
        raise UserError(f"--reward_base {base}: holds no config.json; give the base model's folder")
    raise UserError(
        f"{path}: --reward_format trlx: no config.json beside the weights; name the folder of the "
        "base model (its config and tokenizer) with --reward_base"
    )


def weight_files(path: str | Path) -> list[Path]:
    """The weight files of a published model, in a stable order; of several kinds the safest.

    Raises:
        UserError: there is no such folder, or no weights in it.
    """
    place = Path(model_folder(path))
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UserError(f"{path}: no such folder or weight file; give a published model's folder")
    for suffix in _SUFFIXES:
        for index in sorted(place.glob(f"*{suffix}.index.json")):
            names = set(json.loads(index.read_text())["weight_map"].values())
            if missing := [name for name in sorted(names) if not (place / name).is_file()]:
                raise UserError(f"{place}: {index.name} names {missing[0]}, which is not there")
            return [place / name for name in sorted(names)]
        files = [
            file
            for file in sorted(place.glob(f"*{suffix}"))
            if not file.name.startswith(("training_args", "optimizer", "scheduler", "rng_state"))
        ]
        if files:
            return files
    raise UserError(
        f"{place}: --reward_format trlx: no weights here; expected a .safetensors, .pt or .bin file"
    )


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{file}: cannot be read as plain weights; what is not a tensor is refused, because it "
            f"could run code ({str(error).splitlines()[0][:200]})"
        ) from error
    weights = loaded.get("module", loaded.get("state_dict", loaded)) if loaded else loaded
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise UserError(f"{file}: holds no table of weights")
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
            f"{file}: {name} has shape {tuple(value.shape)} where the config asks for "
            f"{tuple(target.shape)}; the config belongs to another model"
        )
    target.copy_(value)
