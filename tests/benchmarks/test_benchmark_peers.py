"""TRL's steps in the benchmarks: what they ask of it, and that they compare before they time."""

from __future__ import annotations

import sys
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import dpo_pair, harness, trl_head, trl_peer
from benchmarks.shapes import Shape
from rrhf.data.collate import EncodedSet, collate
from rrhf.models.forward.logprobs import Policy

TINY = Shape(32, 2, 64, 9, (5, 3, 6))
asked: list[Tensor] = []


def _fused(model: Any) -> None:
    """What the peer's head gives, by the long way: log-probs at labels, zero elsewhere."""
    plain = type(model).forward

    def forward(self: nn.Module, labels: Tensor, fused_lm_head: bool, **rows: Tensor) -> Any:
        assert fused_lm_head
        asked.append(labels)
        found = plain(self, **rows).logits[:, :-1].log_softmax(-1)
        targets = labels[:, 1:]
        chosen = found.gather(-1, targets.clamp_min(0)[..., None]).squeeze(-1)
        return SimpleNamespace(log_probs=chosen.masked_fill(targets == -100, 0.0))

    model.forward = MethodType(forward, model)


@pytest.fixture
def _peer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked.clear()
    monkeypatch.setattr(trl_peer, "load", lambda path: SimpleNamespace(add_fused_lm_head=_fused))
    monkeypatch.setattr(trl_peer, "version", lambda: "0")


@pytest.mark.usefixtures("_peer")
def test_labels_stand_at_response_tokens_alone() -> None:
    batch = collate([EncodedSet([5, 6, 7], [[8, 9, 1], [3]]), EncodedSet([9], [[4, 1]])], pad_id=0)
    with torch.no_grad():
        found = trl_peer.FusedHeadRows(TINY.model())(batch).logprobs
        assert torch.allclose(found, Policy(TINY.model())(batch).logprobs, atol=1e-5)
    no = -100
    rows = [[no, no, no, 8, 9, 1], [no, no, no, 3, no, no], [no, 4, 1, no, no, no]]
    assert asked[0].tolist() == rows


@pytest.mark.usefixtures("_peer")
def test_the_rrhf_loss_on_that_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trl_head.CASES, "tiny", TINY)
    result = trl_head.run("tiny", 1)
    assert list(result["timings"]) == ["trl", "shared_prefix", "shared_prefix_mkl", "original"]
    assert max(result["relative_differences"]["shared_prefix"].values()) < 1e-5
    assert "shared_prefix" in trl_head.table(result)


@pytest.mark.usefixtures("_peer")
def test_a_pair_with_and_without_its_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dpo_pair.CASES, "tiny", Shape(32, 2, 64, 9, (5, 3)))
    result = dpo_pair.run("tiny", 1)
    assert list(result["timings"])[:2] == ["trl", "shared_prefix"]
    assert all(max(off.values()) < 1e-5 for off in result["relative_differences"].values())
    assert "precomputed" in dpo_pair.table(result)


def test_the_loss_of_a_pair_by_hand() -> None:
    """beta 0.1; ratios -3 - -4 = 1 and -6 - -5 = -1: -log sigmoid(0.2) = 0.598139."""

    class Fixed(nn.Module):
        def __init__(self, *sums: float) -> None:
            super().__init__()
            self.logprobs = torch.tensor([[total / 2, total / 2] for total in sums])

        def forward(self, batch: Any) -> Any:
            return SimpleNamespace(logprobs=self.logprobs)

    batch = TINY.batch()
    step = dpo_pair.PairStep(Fixed(-3.0, -6.0), Fixed(-4.0, -5.0), batch)
    assert float(step.forward()) == pytest.approx(0.598139, abs=1e-6)


def test_without_the_peer_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(harness.NotMeasured, match="--trl_path"):
        trl_head.run("S1", 1)
