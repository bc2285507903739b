"""The settings of `rrhf train ppo`: PPO, critic-free methods and online ranking."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rrhf.generation.params import FILTERS, check_params
from rrhf.scoring.build import is_made
from rrhf.training.core.offload_levels import parse_levels
from rrhf.training.online.methods import METHODS
from rrhf.training.online.ppo_checks import check_combinations
from rrhf.training.online.ppo_settings import PPOSettings

logger = logging.getLogger(__name__)

GROUP_SIZE = 4
"""Default number of responses to each prompt for methods that compare them."""

KL_COEFF = 0.05
"""Default weight of the KL where nothing else holds the policy near its start."""


@dataclass
class PPOConfig(PPOSettings):
    """Train a policy on its own responses to prompts: PPO with a critic, methods without one
    (RLOO, GRPO, ...), or RRHF on its samples. Writes OUTPUT_DIR/policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        method = METHODS[self.method]
        if self.method_settings is None and method.settings is not None:
            self.method_settings = method.settings()
        settings = self.engine_spec.settings
        if self.engine_settings is None and settings is not None:
            self.engine_settings = settings()
        if self.num_return_sequences == 0:
            self.num_return_sequences = GROUP_SIZE if method.needs_group else 1
        if self.kl_coeff is None:
            ranking = self.ranking
            is_held = ranking is not None and ranking.reference == "start"
            self.kl_coeff = 0.0 if is_held else KL_COEFF
        if self.share_trunk is None:
            self.share_trunk = self._needs_shared_trunk()
        parse_levels(self.offload_level)
        check_params(self.sampling(0))
        check_combinations(self)
        for name, off in {**FILTERS, "min_new_tokens": 0}.items():
            if getattr(self, name) != off:
                logger.warning(
                    "--%s %s: changes sampling but not the log-probs, so the KL will be biased "
                    "and may become negative; keep the default, %s, unless you want this",
                    name,
                    getattr(self, name),
                    off,
                )

    def _needs_shared_trunk(self) -> bool:
        """Whether the settings name no model that a critic could start from; if so, logs a
        message."""
        has_model = self.reward_critic_model_name_or_path or not is_made(
            self.reward_model_name_or_path
        )
        if has_model or not self.has_critic:
            return False
        logger.info(
            "%s is not a model that a critic could start from, so the critic is a value head on "
            "the policy's trunk (--share_trunk); --reward_critic_model_name_or_path MODEL gives "
            "the critic its own trunk, and a --method such as rloo needs no critic",
            self.reward_model_name_or_path,
        )
        return True
