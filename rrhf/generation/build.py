"""Engines by name: add one here and to `rrhf.generation.config`, and every stage can use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.generation.engine import GenerationEngine
from rrhf.generation.local.engine import LocalEngine
from rrhf.models.loading import LoadOptions, load_causal_lm, resolve_device


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is built from.

    Attributes:
        model_name_or_path: the policy.
        max_batch_rows: responses written at the same time, at most.
        max_prompt_tokens: room of a prompt.
        bf16: weights in bfloat16.
        attn_implementation: as transformers spells it.
        trust_remote_code: run code that the model's folder brings.
        local_rank: which GPU of this machine, where there are several processes.
    """

    model_name_or_path: str
    max_batch_rows: int = 32
    max_prompt_tokens: int | None = None
    bf16: bool = False
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    local_rank: int = 0


def build_local(settings: EngineSettings, codec: ChatCodec) -> LocalEngine:
    """The model in this process, on its GPU if there is one."""
    device = resolve_device()
    if device.type == "cuda":
        device = torch.device("cuda", settings.local_rank % torch.cuda.device_count())
    model = load_causal_lm(settings.model_name_or_path, LoadOptions.of(settings, settings.bf16))
    model.to(device)  # type: ignore[arg-type]
    return LocalEngine(model, codec, settings.max_batch_rows, settings.max_prompt_tokens)


ENGINES: dict[str, Callable[[EngineSettings, ChatCodec], GenerationEngine]] = {
    "local": build_local,
}


def build_engine(name: str, settings: EngineSettings, codec: ChatCodec) -> GenerationEngine:
    """The engine of that name.

    Raises:
        UserError: there is none, or its model cannot be loaded.
    """
    if name not in ENGINES:
        raise UserError(f"engine {name!r}: choose one of {', '.join(ENGINES)}")
    return ENGINES[name](settings, codec)
