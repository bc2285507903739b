"""Computes the terms of PPO's loss for one micro-batch of experience.

Every method has the term `policy` (clipped ratio); `value`, `entropy` and `kl` are added if the
settings ask for them. Each term is a sum over tokens or responses, with a count that is known
before the forward pass. Padding and filler rows do not contribute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rrhf.algorithms import ppo_losses
from rrhf.algorithms.kl import KLController, token_kl
from rrhf.algorithms.masked import masked_sum
from rrhf.data.collate import TokenBatch
from rrhf.models.policy_with_value import ActorCriticOutputs
from rrhf.training.core.update import Term
from rrhf.training.online.ppo_config import PPOConfig


class PPOObjective:
    """The loss of PPO and of the critic-free methods, which differ only in their advantages.

    Args:
        config: the settings: clip ranges and weights of the terms.
        controller: provides the coefficient of the KL term (--kl_in loss).

    Attributes:
        policy_is_frozen: True = train only the critic; the policy's terms have weight 0.
    """

    def __init__(self, config: PPOConfig, controller: KLController) -> None:
        self.config = config
        self.policy_is_frozen = False
        self._controller = controller
        self._largest_ratio = torch.zeros(())

    def take_largest_ratio(self) -> float:
        """Return the largest probability ratio on this rank since the last call, and reset it."""
        largest, self._largest_ratio = self._largest_ratio, torch.zeros(())
        return float(largest)

    def denominators(self, batch: TokenBatch) -> dict[str, Tensor]:
        """Return the denominator of each term: the number of tokens or of responses, depending on
        the reduction."""
        count = ppo_losses.reduction_counts(_mask(batch), self.config.reduction).sum()
        return dict.fromkeys(self._names(), count)

    def __call__(self, outputs: ActorCriticOutputs, batch: TokenBatch) -> dict[str, Term]:
        """Return the terms of one micro-batch, with metrics."""
        config, mask, stored = self.config, _mask(batch), batch.experience
        assert stored is not None, "a rollout made the batch"
        old, advantages = stored.old_logprobs, stored.advantages
        clips = ppo_losses.Clips(
            config.clip_range_ratio, config.clip_high, config.dual_clip or None
        )
        metrics = ppo_losses.policy_metrics(outputs.logprobs, old, advantages, mask, clips)
        if outputs.entropy is not None:
            metrics["entropy"] = (masked_sum(outputs.entropy.detach(), mask).sum(), mask.sum())
        largest = ppo_losses.largest_ratio(outputs.logprobs, old, mask)
        self._largest_ratio = torch.maximum(self._largest_ratio.to(largest.device), largest)
        losses = ppo_losses.policy_losses(outputs.logprobs, old, advantages, mask, clips)
        terms = {"policy": self._term(losses, mask, 1.0, metrics)}
        if "value" in self._names():
            assert outputs.values is not None, "a value term needs a critic"
            assert stored.old_values is not None and stored.returns is not None
            stored_values = (stored.old_values, stored.returns)
            limit = config.clip_range_value or None
            terms["value"] = Term(
                self._total(
                    ppo_losses.value_losses(outputs.values, *stored_values, mask, limit), mask
                ),
                config.vf_coeff * self._scale,
                ppo_losses.value_metrics(outputs.values, *stored_values, mask, limit),
            )
        if "entropy" in self._names():
            assert outputs.entropy is not None, "an entropy term needs the policy's entropy"
            entropy = ppo_losses.entropy_losses(outputs.entropy, mask)
            terms["entropy"] = self._term(entropy, mask, config.entropy_coeff)
        if "kl" in self._names():
            assert stored.reference_logprobs is not None, "a KL term needs a reference"
            kl = token_kl(
                outputs.logprobs, stored.reference_logprobs, mask, config.token_kl_estimator
            )
            terms["kl"] = self._term(kl, mask, self._controller.coefficient)
        return terms

    @property
    def _scale(self) -> float:
        """1 / max_new_tokens if losses are summed over a response (sequence-sum), else 1."""
        return 1 / self.config.max_new_tokens if self.config.reduction == "sequence-sum" else 1.0

    def _names(self) -> list[str]:
        config = self.config
        wanted = {
            "policy": True,
            "value": config.has_critic,
            "entropy": config.entropy_coeff > 0,
            "kl": config.kl_in == "loss",
        }
        return [name for name, is_wanted in wanted.items() if is_wanted]

    def _term(
        self,
        token_losses: Tensor,
        mask: Tensor,
        weight: float,
        metrics: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Term:
        """Build a term that trains the policy; its weight is 0 while the policy is frozen."""
        weight = 0.0 if self.policy_is_frozen else weight * self._scale
        return Term(self._total(token_losses, mask), weight, metrics or {})

    def _total(self, token_losses: Tensor, mask: Tensor) -> Tensor:
        return ppo_losses.reduce_rows(token_losses, mask, self.config.reduction)[0].sum()


def _mask(batch: TokenBatch) -> Tensor:
    """Return [N, R], True at response tokens of rows with a weight above 0."""
    return batch.response_mask & (batch.row_weights > 0)[:, None]
