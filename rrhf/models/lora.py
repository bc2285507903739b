"""Low-rank adapters (LoRA), by peft."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from rrhf.errors import UserError


def add_lora(
    model: PreTrainedModel,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: list[str] | None = None,
    modules_to_save: list[str] | None = None,
    task_type: str = "CAUSAL_LM",
) -> Any:
    """Add trainable LoRA adapters to a model and freeze its weights.

    Args:
        model: any Hugging Face model.
        r: rank of the adapters.
        alpha: the adapters' output is scaled by alpha / r.
        dropout: dropout rate inside the adapters.
        target_modules: names of the layers that get adapters; None selects every linear layer
            except the head.
        modules_to_save: layers that are trained in full, such as a new head.
        task_type: peft's name for the kind of model.

    Raises:
        UserError: peft is not installed, or no layer has one of the target names.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(
            "--use_lora: the package peft is not installed; install rrhf[peft]"
        ) from error
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        modules_to_save=modules_to_save,
        task_type=task_type,
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"--lora_target_modules {target_modules}: {error}") from error
