"""Forward and backward of one model, and whether two of them compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from rrhf.models.forward import onednn_linear

EXACT = 1e-5
"""By how much a loss and a gradient may differ, relatively, in float32."""


class TrainingStep:
    """One step of a policy, short of the optimizer's. Subclasses say what is minimised.

    Args:
        policy: takes a batch.
        usual_products: matrices are multiplied as PyTorch does, never through oneDNN by our choice.
    """

    def __init__(self, policy: nn.Module, usual_products: bool = False) -> None:
        self.policy = policy.train()
        self._usual_products = usual_products

    def forward(self) -> Tensor:
        """The loss."""
        raise NotImplementedError

    def __call__(self) -> Tensor:
        self.policy.zero_grad(set_to_none=True)
        with self.products():
            loss = self.forward()
            loss.backward()
        return loss.detach()

    def products(self) -> AbstractContextManager[Any]:
        """In which everything is multiplied."""
        if not self._usual_products:
            return nullcontext()
        return patch.object(onednn_linear, "gains_here", lambda: False)

    def gradient(self) -> Tensor:
        """In float32, as it was left."""
        parts = [p.grad.float().flatten() for p in self.policy.parameters() if p.grad is not None]
        return torch.cat(parts)


def compared(
    steps: Mapping[str, TrainingStep], tolerances: Mapping[str, float] | None = None
) -> dict[str, dict[str, float]]:
    """Run each step once; how far loss and gradient are from the first one's, relatively.

    Args:
        steps: by name.
        tolerances: of those that may differ by more than `EXACT`.

    Raises:
        AssertionError: one computes something else than the first.
    """
    names = list(steps)
    expected_loss = steps[names[0]]()
    expected = steps[names[0]].gradient()
    differences = {}
    for name in names[1:]:
        loss = float((steps[name]() - expected_loss).abs() / expected_loss.abs())
        gradient = float((steps[name].gradient() - expected).norm() / expected.norm())
        differences[name] = {"loss": loss, "gradient": gradient}
        allowed = (tolerances or {}).get(name, EXACT)
        assert max(loss, gradient) <= allowed, f"{name} differs: {differences[name]}"
    return differences
