"""Held-out losses are sums over global counts, as in training."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from torch import Tensor

from rrhf.data.collate import EncodedSet, TokenBatch
from rrhf.models.forward.logprobs import Policy, PolicyOutputs
from rrhf.progress import Progress
from rrhf.training.core.measure import measure
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.streams import StepCut
from rrhf.training.core.update import Term

EXAMPLES = [EncodedSet([3 + i, 4], [[5 + t + i for t in range(i % 4 + 1)]]) for i in range(7)]


class TwoTerms:
    """Log-likelihood by token and by row, with unequal weights; one term never has a count."""

    def denominators(self, batch: TokenBatch) -> dict[str, Tensor]:
        weights = batch.row_weights
        tokens = (batch.response_lengths * weights).sum()
        return {"token": tokens, "row": weights.sum(), "never": torch.zeros(())}

    def __call__(self, outputs: PolicyOutputs, batch: TokenBatch) -> dict[str, Term]:
        total = -(outputs.logprobs.sum(1) * batch.row_weights).sum()
        lengths = (batch.response_lengths * batch.row_weights).sum()
        metrics = {"length": (lengths, batch.row_weights.sum())}
        return {
            "token": Term(total, 2.0, metrics),
            "row": Term(total, 0.5),
            "never": Term(total, 1.0),
        }


@pytest.mark.parametrize("per_device_batch_size", [1, 3, 7, 20])
def test_measure_equals_one_sum_over_everything(per_device_batch_size: int) -> None:
    model = tiny_llama()
    nll, tokens = 0.0, 0
    for example in EXAMPLES:
        (response,) = example.response_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*example.prompt_ids, *response]])).logits[0]
        logprobs = logits.log_softmax(-1)
        for t, token in enumerate(response):
            nll -= float(logprobs[len(example.prompt_ids) + t - 1, token])
            tokens += 1
    found = measure(
        Policy(model), TwoTerms(), EXAMPLES, StepCut(2, per_device_batch_size), Parallel()
    )
    assert found["token_loss"] == pytest.approx(nll / tokens, rel=1e-5)
    assert found["row_loss"] == pytest.approx(nll / len(EXAMPLES), rel=1e-5)
    assert found["never_loss"] == 0.0
    assert found["loss"] == pytest.approx(2.0 * nll / tokens + 0.5 * nll / 7, rel=1e-5)
    assert found["length"] == pytest.approx(tokens / len(EXAMPLES))


class Weighted(TwoTerms):
    """The weight of a term is that of its batch."""

    def __call__(self, outputs: PolicyOutputs, batch: TokenBatch) -> dict[str, Term]:
        terms = super().__call__(outputs, batch)
        return {"token": replace(terms["token"], weight=float(batch.prompt_ids[0, 0]))} | {
            name: replace(terms[name], weight=0.0) for name in ("row", "never")
        }


def test_each_batch_enters_the_loss_by_its_own_weight() -> None:
    policy = Policy(tiny_llama())
    total = tokens = 0.0
    for example in EXAMPLES:
        alone = measure(policy, TwoTerms(), [example], StepCut(2, 1), Parallel())
        count = len(example.response_ids[0])
        total += alone["token_loss"] * count * example.prompt_ids[0]
        tokens += count
    found = measure(policy, Weighted(), EXAMPLES, StepCut(2, 1), Parallel())
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_measure_leaves_no_gradient() -> None:
    policy = Policy(tiny_llama())
    measure(policy, TwoTerms(), EXAMPLES, StepCut(2, 2), Parallel())
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_progress_on_two_ranks_ends_at_the_number_of_examples(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(Progress, "advance", lambda self, count=1: told.append(count))
    parallel: Any = Parallel()
    parallel.rank, parallel.world_size = 0, 2
    parallel.sum = lambda rows: rows
    measure(
        Policy(tiny_llama()), TwoTerms(), EXAMPLES[:count], StepCut(2, 1, world_size=2), parallel
    )
    assert sum(told) == count
