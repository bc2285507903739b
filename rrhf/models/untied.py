"""Writes the weights of a policy in training for a server that samples from it.

The folder differs from a saved policy (`rrhf.models.saving`) in two ways. The output layer has its
own weights even if the model shares them with its embeddings, because a server on a CPU may keep a
packed copy of the output layer and would not notice that the shared weights changed. And its
weights are divided by the sampling temperature, so that a server that samples at temperature 1, and
reports log-probs at temperature 1, reports those of the policy at the sampling temperature.

It is not sealed, because no later command reads it: the server's log-probs are compared with the
trainer's instead. A file in it says that it may be replaced; no other folder is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from rrhf.errors import UserError
from rrhf.models.forward.logprobs import inner_model
from rrhf.models.saving import merged_weights
from rrhf.staged_folders import no_trace_of_failure

MARKER = ".copied-for-a-server"
"""Name of the file by which such a folder is known, and may be replaced."""


def require_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier copy for a server.

    Raises:
        UserError: it would be lost.
    """
    if folder.is_dir() and ((folder / MARKER).exists() or not any(folder.iterdir())):
        return
    if folder.exists() or folder.is_symlink():
        raise UserError(
            f"{folder}: exists, and is not a copy of a model that was written for a server, so it "
            "is not replaced; name a new folder (--served_folder), or remove this one yourself"
        )


def output_layer(model: Any) -> torch.nn.Linear:
    """Return the output layer of a Hugging Face model.

    Raises:
        UserError: it is not a plain linear layer.
    """
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise UserError(
            f"{type(inner).__name__}: its output layer is not a plain linear layer, so a vLLM "
            "server cannot be given its weights; use --engine local"
        )
    return head


@torch.no_grad()
def write_untied_folder(folder: Path, model: Any, temperature: float = 1.0) -> None:
    """Write a model's weights and config under a temporary name, then rename the folder.

    Args:
        folder: the folder to write; an earlier copy is replaced, and no other folder.
        model: the Hugging Face model, with all its weights; LoRA adapters are merged into a copy.
        temperature: the sampling temperature.

    Raises:
        UserError: the folder holds something else, the disk is full, or the model's output layer
            is not a plain linear layer.
    """
    require_replaceable(folder)
    inner, head = inner_model(model), output_layer(model)
    if hasattr(model, "merge_and_unload"):
        weights = merged_weights(model, dict(model.state_dict()))
    else:
        weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    own = {id(parameter) for parameter in head.parameters()}
    names = [n for n, p in inner.named_parameters(remove_duplicate=False) if id(p) in own]
    for name in names:
        if inner.get_submodule(name.rpartition(".")[0]) is head:
            weights[name] = weights[name] / temperature  # a copy
    staged = folder.with_name(f".{folder.name}.{os.getpid()}")
    with no_trace_of_failure(staged):
        staged.mkdir(parents=True)
        config, was_tied = inner.config, inner.config.tie_word_embeddings
        config.tie_word_embeddings = False
        try:
            inner.save_pretrained(staged, state_dict=weights)
        finally:
            config.tie_word_embeddings = was_tied
        (staged / MARKER).touch()
        if folder.exists():
            shutil.rmtree(folder)
        staged.rename(folder)
