"""A whole copy of a policy whose weights are spread, for what cannot be done with pieces: sampling.

A rank that samples asks for as many forwards as its longest response has tokens, and under sharding
each would be a call that all ranks must join; so each samples from weights of its own. They are
brought up to date before a rollout, one weight at a time. The price is memory: each rank holds its
piece of weights, gradients and optimiser, and the whole policy once more (without gradients).
"""

from __future__ import annotations

import copy

import torch

from rrhf.models.forward.logprobs import Policy
from rrhf.training.core.parallel import Parallel


class WholeCopy:
    """Follows a policy at a distance.

    Args:
        policy: inside the trained actor-critic, not spread yet.
        parallel: knows where its weights are.

    Attributes:
        policy: the copy, as the policy was when it was last refreshed.
    """

    def __init__(self, policy: Policy, parallel: Parallel) -> None:
        self._live, self._parallel = policy, parallel
        self.policy = copy.deepcopy(policy).to(parallel.device).eval()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the policy's present weights; every rank must call it."""
        mine = dict(self.policy.named_parameters())
        for name, weight in self._parallel.whole_weights(self._live, trained_only=True):
            mine[name].copy_(weight)
