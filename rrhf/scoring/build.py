"""Which scorer a word names: one dict from prefix to maker, and a folder for everything else.

- `gold:help_desk`: the true preference of the embedded world;
- `function:module:name`: a Python function;
- anything else: the folder or hub name of a reward model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from rrhf.errors import UserError
from rrhf.scoring.scorer import Scorer


@dataclass
class RewardModelOptions:
    """How a local reward model reads and computes; other scorers take no options."""

    reward_format: Literal["standard", "trlx"] = "standard"
    """Layout of the reward model: standard (transformers' sequence classification) or trlx (keys
    transformer.* and v_head.weight, such as Dahoas/gptj-rm-static)."""

    reward_base: str | None = None
    """With trlx: folder with the base model's config.json and tokenizer, where the reward model's
    has none."""

    score_at: Literal["last_token", "first_eos"] = "last_token"
    """Token at which a standard reward model is read; trlx is always read at the first EOS."""

    normalize: bool = True
    """Apply the score normaliser that the reward model carries, if it carries one."""

    reward_chat_format: Literal["auto", "raw", "hh", "alpaca", "chat_template"] = "auto"
    """How the reward model reads conversations; auto: as it was trained."""

    max_length: int = 0
    """Most tokens of prompt and response; 0 = the model's window (trlx: 1024)."""

    max_batch_tokens: int = 16384
    """Tokens of one forward, padding included; lower it where memory runs out."""

    engine: Literal["auto", "shared_prefix", "flex_attention", "dense_mask", "padded"] = "auto"
    """How rows pass a model that reads them: shared_prefix = each prompt once, auto = fastest that
    serves it."""

    bf16: bool = False
    """Load the reward model in bfloat16: half the memory, scores differ in the third digit."""

    attn_implementation: str = "sdpa"
    """Attention of the reward model: sdpa, eager or flash_attention_2."""

    trust_remote_code: bool = False
    """Run Python code that the model folder brings. Off unless you trust its author."""

    trlx_double_blank: bool = False
    """With trlx: a blank before a response even if it begins with one, as RRHF's script has it."""


def build_scorer(
    spec: str,
    options: RewardModelOptions | None = None,
    device: torch.device | str | None = None,
) -> Scorer:
    """The scorer that `spec` names; see the module text.

    Args:
        spec: as in the module text.
        options: of a local reward model.
        device: of a local reward model; by default the first GPU or the CPU.

    Raises:
        UserError: an unknown name, or whatever the scorer finds amiss.
    """
    options = options or RewardModelOptions()
    prefix, _, rest = spec.partition(":")
    maker = SCORERS.get(prefix) if rest else None
    if maker is not None:
        return maker(rest)
    return _reward_model(spec, options, device)


def check_scorer(spec: str, options: RewardModelOptions | None = None) -> None:
    """Find mistakes in a scorer's name before any weights are loaded.

    Raises:
        UserError: no such world, function, folder, or the folder holds no reward model.
    """
    options = options or RewardModelOptions()
    prefix, _, rest = spec.partition(":")
    if rest and prefix in SCORERS:
        SCORERS[prefix](rest)
    elif options.reward_format == "trlx":
        from rrhf.models.trlx_reward_model import config_folder, weight_files

        weight_files(spec)
        config_folder(spec, options.reward_base)
    else:
        from rrhf.models.reward_model import require_reward_model

        require_reward_model(spec, options.trust_remote_code)


def _gold(rest: str) -> Scorer:
    from rrhf.worlds.help_desk import GoldScorer

    if rest != "help_desk":
        raise UserError(f"gold:{rest}: the world with a gold preference is gold:help_desk")
    return GoldScorer()


def _function(rest: str) -> Scorer:
    from rrhf.scoring.function import FunctionScorer

    return FunctionScorer(rest)


def _reward_model(
    path: str, options: RewardModelOptions, device: torch.device | str | None
) -> Scorer:
    from rrhf.scoring.reward_model import RewardModelScorer, TrlxScorer

    if options.reward_format == "trlx":
        return TrlxScorer(
            path,
            base=options.reward_base,
            double_blank=options.trlx_double_blank,
            max_length=options.max_length,
            max_batch_tokens=options.max_batch_tokens,
            bf16=options.bf16,
            device=device,
            engine=options.engine,
        )
    return RewardModelScorer(
        path,
        score_at=options.score_at,
        use_normalizer=options.normalize,
        chat_format=options.reward_chat_format,
        max_length=options.max_length,
        max_batch_tokens=options.max_batch_tokens,
        bf16=options.bf16,
        attn_implementation=options.attn_implementation,
        trust_remote_code=options.trust_remote_code,
        device=device,
        engine=options.engine,
    )


SCORERS: dict[str, Callable[[str], Scorer]] = {
    "gold": _gold,
    "function": _function,
}
