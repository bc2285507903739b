"""The registry's entry of `--engine vllm`; nothing here imports torch."""

from __future__ import annotations

from rrhf.generation.build import EngineOptions, EngineSpec
from rrhf.generation.engine import GenerationEngine
from rrhf.generation.vllm.settings import VLLMSettings


def build(options: EngineOptions) -> GenerationEngine:
    """Build the engine for a server that is running."""
    from rrhf.generation.vllm.engine import VLLMEngine  # here, to read flags without torch

    return VLLMEngine(options)


def check(settings: VLLMSettings, is_live: bool) -> None:
    """Refuse a server that does not answer, or that cannot be given the weights of a training.

    Raises:
        UserError: the message ends with the next step.
    """
    from rrhf.generation.vllm.server import VLLMServer

    VLLMServer(settings).require(is_live)


VLLM = EngineSpec(build, VLLMSettings, check=check)
