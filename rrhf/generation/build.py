"""The registry of engines; a user's own engine is named by its import path.

Nothing here imports torch until an engine is built, so that flags can be read without torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.errors import UserError
from rrhf.generation.engine import GenerationEngine
from rrhf.models.forward.names import LAYOUTS
from rrhf.registry import Registry

if TYPE_CHECKING:
    from rrhf.data.chat_format import ChatCodec


@dataclass(frozen=True)
class EngineOptions:
    """The arguments from which an engine may be built.

    Attributes:
        model_name_or_path: the policy: its folder, or the name by which the engine knows it.
        model: loads the Hugging Face model of that folder onto its device.
        codec: loads the codec that turns the model's text into ids and back.
        max_batch_rows: maximum number of responses generated at the same time.
        max_prompt_tokens: maximum number of tokens in a prompt; None = as many as the model's
            window allows.
        settings: an instance of the dataclass `settings` in the engine's `EngineSpec`, or None.
        temperature: the sampling temperature.
        is_live: whether `model` returns a policy in training, whose weights change between calls of
            the engine.
        answers_file: where the engine may keep responses until they are in a finished file; None =
            nowhere.
    """

    model_name_or_path: str
    model: Callable[[], Any]
    codec: Callable[[], ChatCodec]
    max_batch_rows: int = 32
    max_prompt_tokens: int | None = None
    settings: Any = None
    temperature: float = 1.0
    is_live: bool = False
    answers_file: Path | None = None


@dataclass(frozen=True)
class EngineSpec:
    """An entry of the registry of engines.

    Attributes:
        build: makes the engine.
        settings: a dataclass; its fields become flags when the engine is chosen. None = no flags.
        has_model: whether --model_name_or_path names a model that can be loaded here. If so, its
            tokenizer measures prompts and its likelihoods can be computed; otherwise only the
            engine understands the name.
        check: called with the settings, and whether the engine will serve a policy in training,
            before any model is loaded; raises a UserError if the engine cannot work. None = no
            check.
        is_remote: whether the engine only sends prompts to servers: it is given all prompts at
            once, answers each whatever the others are, and one process is enough.
        unused: flags that the engine has no use for; values other than their defaults are refused.
        author: what the sources of its responses begin with: policy, or teacher.
    """

    build: Callable[[EngineOptions], GenerationEngine]
    settings: type | None = None
    has_model: bool = True
    check: Callable[[Any, bool], None] | None = None
    is_remote: bool = False
    unused: tuple[str, ...] = ()
    author: str = "policy"


def require_used(config: Any, *names: str) -> None:
    """Refuse values of flags that the chosen engine has no use for.

    Args:
        config: a configuration with the fields `engine` and `engine_spec`.
        names: the fields to check; none = all.

    Raises:
        UserError: such a field does not have its default.
    """
    for item in fields(config):
        is_unused = item.name in config.engine_spec.unused and (not names or item.name in names)
        if is_unused and getattr(config, item.name) != item.default:
            other = " (in response-gen, --score_bf16 is the scorer's alone)"
            raise UserError(
                f"--{item.name} {getattr(config, item.name)}: --engine {config.engine} has no use "
                f"for it; leave it out{other if item.name == 'bf16' else ''}"
            )


def build_local(options: EngineOptions) -> GenerationEngine:
    """Build the engine that runs the model in this process."""
    from rrhf.generation.local.engine import LocalEngine  # here, to read flags without torch

    return LocalEngine(
        options.model(), options.codec(), options.max_batch_rows, options.max_prompt_tokens
    )


LOCAL = EngineSpec(build_local)

_LAYOUT = "that is a layout (how a batch passes the network), and its flag is --layout"
ENGINES: Registry[EngineSpec] = Registry(
    "engine",
    EngineSpec,
    {
        "local": f"{__name__}:LOCAL",
        "vllm": "rrhf.generation.vllm.spec:VLLM",
        "openai_server": "rrhf.generation.openai_server.spec:OPENAI_SERVER",
    },
    dict.fromkeys(LAYOUTS, _LAYOUT),
)
