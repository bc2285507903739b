"""Which scorer a word names: one dict from prefix to maker, and a folder for everything else.

- `gold:help_desk`: the true preference of the embedded world;
- `function:module:name`: a Python function;
- anything else: the folder or hub name of a reward model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rrhf.errors import UserError
from rrhf.models.reward_folders import config_folder, require_score_head, weight_files
from rrhf.scoring.config import RewardModelOptions
from rrhf.scoring.scorer import Scorer

if TYPE_CHECKING:
    import torch


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
    check_scorer_place(spec, options)
    if not is_made(spec) and options.reward_format != "trlx":
        from rrhf.models.reward_model import require_reward_model

        require_reward_model(spec, options.trust_remote_code)


def check_scorer_place(spec: str, options: RewardModelOptions) -> None:
    """The part of `check_scorer` that needs neither torch nor a network.

    Raises:
        UserError: as there.
    """
    if is_made(spec):
        prefix, _, rest = spec.partition(":")
        SCORERS[prefix](rest)
    elif options.reward_format == "trlx":
        weight_files(spec)
        config_folder(spec, options.reward_base)
    else:
        require_score_head(spec)


def is_made(spec: str) -> bool:
    """Whether a prefix names the scorer, rather than a folder."""
    prefix, _, rest = spec.partition(":")
    return bool(rest) and prefix in SCORERS


def _gold(rest: str) -> Scorer:
    from rrhf.worlds.help_desk.world import GoldScorer

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
