"""How far the policy is from its reference, token by token, and what that costs.

Three estimators of KL(policy || reference) from the tokens that the policy sampled (J. Schulman,
"Approximating KL divergence", 2020), with d = log p - log p_ref of the sampled token:

    name  value             gradient by log p   what the gradient is in expectation
    k1    d                 1                   zero: useless as a loss, right in a reward
    k2    d^2 / 2           d                   that of KL(policy || reference)
    k3    exp(-d) - 1 + d   1 - exp(-d)         that of KL(reference || policy)

k1 and k3 have the KL as their expectation, k1 with either sign, k3 never negative; k2 is biased.
"k3_with_k2_gradient" has the value of k3 and the gradient of k2; plain k3
never has that gradient.

The coefficient of the penalty is fixed, or follows a target. Adding up tokens into rows is not
here: the rewards take each token's KL as it is, a loss takes rows from `ppo_losses.reduce_rows`.

Legend: N rows (responses), T positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rrhf.algorithms.names import KL_ESTIMATORS

LOG_RATIO_LIMIT = 20.0
ERROR_LIMIT = 0.2


def token_kl(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    estimator: str = "k1",
    limit: float | None = None,
) -> Tensor:
    """The KL penalty of every sampled token; see the module text for values and gradients.

    Two clamps, and no others. In k3 log p_ref - log p is held at 20 from above, so that one token
    to which the policy gives nothing cannot make infinity: there the value is 4.9e8 and the
    gradient zero. `limit`, where given, holds the result within [-limit, limit], also with zero
    gradient beyond.

    Args:
        logprobs: [N, T] of the sampled tokens under the policy, at the sampling temperature, nats.
        reference_logprobs: [N, T] of the same tokens under the reference, likewise.
        mask: [N, T] True at response tokens; other values are never read.
        estimator: one of `KL_ESTIMATORS`. A loss takes one of `KL_LOSS_ESTIMATORS`.
        limit: nats; None for no limit.

    Returns:
        [N, T] nats; zero outside the mask.

    Raises:
        ValueError: the estimator is not known.
    """
    assert mask.dtype == torch.bool, "a mask is boolean; build it from lengths"
    difference = logprobs - reference_logprobs
    # Before anything else: exp of what padding holds would reach the gradient as zero times NaN.
    difference = torch.where(mask, difference, torch.zeros_like(difference))
    if estimator == "k1":
        kl = difference
    elif estimator == "k2":
        kl = _k2(difference)
    elif estimator == "k3":
        kl = _k3(difference)
    elif estimator == "k3_with_k2_gradient":
        k2 = _k2(difference)
        kl = _k3(difference).detach() + (k2 - k2.detach())
    else:
        raise ValueError(f"KL estimator is {estimator!r}; take one of {', '.join(KL_ESTIMATORS)}")
    return kl if limit is None else kl.clamp(-limit, limit)


def _k2(difference: Tensor) -> Tensor:
    return 0.5 * difference.square()


def _k3(difference: Tensor) -> Tensor:
    log_ratio = (-difference).clamp(max=LOG_RATIO_LIMIT)
    return log_ratio.expm1() - log_ratio


class KLController:
    """The coefficient of the KL penalty: fixed, or steered so that the KL meets a target.

        e = clip(kl / target - 1, -0.2, 0.2)
        coefficient = coefficient * (1 + e * num_responses / horizon)

    Ziegler et al. 2019, arXiv:1909.08593, whose K_beta of 0.1 is written here as
    responses over a horizon, so that the size of a rollout does not change how fast it steers.

    **The unit is nats per response**: `target` and the observed KL are sums over a response's
    tokens, averaged over all responses of all ranks. A program that averages over tokens means by
    the same target about |response| times more. Feed each rank the same, global numbers, or the
    ranks' coefficients drift apart.

    Args:
        coefficient: beta, to begin with; with a target above zero, for zero would never change.
        target: nats per response; None = the coefficient stays as it is.
        horizon: responses.

    Attributes:
        coefficient: beta, by which the next rollout's KL is multiplied.

    Raises:
        ValueError: the coefficient is negative, or with a target one of the three is not above
            zero.
    """

    def __init__(
        self, coefficient: float, target: float | None = None, horizon: float = 10_000
    ) -> None:
        if target is None:
            if not (math.isfinite(coefficient) and coefficient >= 0):
                raise ValueError(f"the KL coefficient is {coefficient}; give zero or more")
        else:
            given = {
                "first adaptive KL coefficient": coefficient,
                "KL target": target,
                "KL horizon": horizon,
            }
            for name, value in given.items():
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"the {name} is {value}; give a number above zero")
        self.coefficient = float(coefficient)
        self.target = target
        self.horizon = float(horizon)
        self._kind = "fixed" if target is None else "adaptive"

    def update(self, kl: float, num_responses: int) -> None:
        """Raise the coefficient where the KL was above the target, lower it where below.

        Args:
            kl: nats per response of a finished rollout: the sum of k1 over a response's tokens,
                averaged over all responses, on all ranks.
            num_responses: how many those were, on all ranks.

        Raises:
            ValueError: one rollout is five horizons or longer, which could turn the sign.
        """
        if self.target is None:
            return
        assert math.isfinite(kl), "a KL that is not finite belongs to the NaN guard, not here"
        if ERROR_LIMIT * num_responses >= self.horizon:
            raise ValueError(
                f"a rollout of {num_responses} responses is too long for a KL horizon of "
                f"{self.horizon:g}: give a horizon above {ERROR_LIMIT * num_responses:g}"
            )
        error = min(max(kl / self.target - 1.0, -ERROR_LIMIT), ERROR_LIMIT)
        self.coefficient *= 1.0 + error * num_responses / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """What has been learnt, as plain numbers; target and horizon are the configuration's."""
        return {"type": self._kind, "coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        assert state["type"] == self._kind, "a run resumes with the KL controller it began with"
        self.coefficient = float(state["coefficient"])
