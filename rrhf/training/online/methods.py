"""Online methods, a record each: what a method makes of the rewards of a rollout.

Everything else of online training (rollouts, scores, the KL penalty, the loop) is the same for all
of them. Nothing here imports torch, so that flags are read without it: what computes is named by an
import path, or given as the function itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rrhf.registry import Registry
from rrhf.training.methods.objectives import OBJECTIVES
from rrhf.user_code import imported

_ESTIMATORS = "rrhf.training.online.estimators"
_COMMON_FLAGS = ("ppo_epochs", "clip_range_ratio", "kl_in", "kl_estimator", "loss_reduction")


@dataclass(frozen=True)
class OnlineMethod:
    """One method of `rrhf train ppo`.

    Exactly one of `advantages` and `objective` is given.

    Attributes:
        advantages: (rewarded, settings) -> advantages [N, T] of every response token, and for a
            critic its targets [N, T], else None; a function, or its import path. `rewarded` is an
            `rrhf.training.online.estimators.Rewarded`, `settings` the `PPOSettings` of the run.
        objective: the name of an objective of `rrhf train rank` that ranks the responses to each
            prompt by their rewards instead.
        needs_group: it compares the responses to one prompt, so it needs two of them at least.
        has_critic: a value model is trained along.
        reduction: of the losses over tokens, where --loss_reduction is auto.
        settings: a dataclass of its own settings, in `settings.method_settings`; its fields are
            flags where the method is chosen.
        shown: flags that it is tuned by, for its help page.
    """

    advantages: str | Callable[[Any, Any], tuple[Any, Any]] | None = None
    objective: str = ""
    needs_group: bool = False
    has_critic: bool = False
    reduction: str = "token-mean"
    settings: type | None = None
    shown: tuple[str, ...] = _COMMON_FLAGS

    def __post_init__(self) -> None:
        assert (self.advantages is None) == bool(self.objective), "advantages or an objective"

    @property
    def ranks(self) -> bool:
        """Whether it trains on ranked groups, a prompt with its responses, not on advantages."""
        return bool(self.objective)

    def estimator(self) -> Callable[[Any, Any], tuple[Any, Any]]:
        """The function behind `advantages`."""
        assert self.advantages is not None, "a method that ranks has no advantages"
        if isinstance(self.advantages, str):
            found: Callable[[Any, Any], tuple[Any, Any]] = imported(self.advantages)
            return found
        return self.advantages


PPO = OnlineMethod(
    f"{_ESTIMATORS}:ppo",
    has_critic=True,
    shown=(
        "critic_learning_rate",
        "critic_warmup_steps",
        "share_trunk",
        "ppo_epochs",
        "clip_range_ratio",
        "clip_range_value",
        "vf_coeff",
        "gae_lambda",
    ),
)
RLOO = OnlineMethod(f"{_ESTIMATORS}:rloo", needs_group=True)
GRPO = OnlineMethod(f"{_ESTIMATORS}:grpo", needs_group=True, reduction="sequence-mean")
DR_GRPO = OnlineMethod(f"{_ESTIMATORS}:dr_grpo", needs_group=True, reduction="sequence-sum")
GOPO = OnlineMethod(f"{_ESTIMATORS}:gopo", needs_group=True)
REINFORCE_PP = OnlineMethod(
    f"{_ESTIMATORS}:reinforce_pp", shown=("normalize_advantage", *_COMMON_FLAGS)
)
RRHF = OnlineMethod(
    objective="rrhf",
    needs_group=True,
    settings=OBJECTIVES["rrhf"].settings,
    shown=("ppo_epochs",),
)

METHODS: Registry[OnlineMethod] = Registry(
    "method",
    OnlineMethod,
    {
        name: f"{__name__}:{name.upper()}"
        for name in ("ppo", "rloo", "grpo", "dr_grpo", "gopo", "reinforce_pp", "rrhf")
    },
)
