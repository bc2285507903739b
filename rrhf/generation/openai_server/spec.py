"""The entry of the engine `openai_server` in the registry, and its settings."""

from __future__ import annotations

from dataclasses import dataclass

from rrhf.endpoints.server import require_openai
from rrhf.endpoints.settings import EndpointSettings
from rrhf.errors import UserError
from rrhf.generation.build import EngineOptions, EngineSpec
from rrhf.generation.engine import GenerationEngine


@dataclass(kw_only=True)
class OpenAIServerSettings(EndpointSettings):
    """How servers of OpenAI's API are asked for responses."""

    send_seed: bool = False
    """Send a seed with each request, if the server honours it, as vLLM does."""


def build_openai_server(options: EngineOptions) -> GenerationEngine:
    """Build the engine; a missing key is an error here."""
    from rrhf.generation.openai_server.engine import OpenAIServerEngine

    return OpenAIServerEngine(options)


def check_openai_server(settings: OpenAIServerSettings, is_live: bool) -> None:
    """Refuse the engine if the package `openai` is missing, or for a policy in training.

    Raises:
        UserError: one of these.
    """
    if is_live:
        raise UserError(
            "--engine openai_server: gives text alone, but training on fresh samples needs token "
            "ids, log-probs and the weights that are trained; use --engine local or vllm"
        )
    require_openai("--engine openai_server")


OPENAI_SERVER = EngineSpec(
    build_openai_server,
    OpenAIServerSettings,
    has_model=False,
    check=check_openai_server,
    is_remote=True,
    unused=(
        *("max_prompt_tokens", "min_new_tokens", "top_k", "repetition_penalty"),
        *("num_beams", "num_beam_groups", "diversity_penalty", "length_penalty"),
        *("per_device_prompt_batch_size", "chat_format", "bf16"),
        *("attn_implementation", "trust_remote_code"),
    ),
    author="teacher",
)
