"""Cross-entropy against torch's own over full logits, and against loops."""

import math

import pytest
import torch

from rrhf.algorithms.cross_entropy import cross_entropy
from rrhf.algorithms.masked import length_mask

ROWS, WIDTH, VOCABULARY = 3, 6, 11
LENGTHS = (6, 2, 0)


def logits_and_targets() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(5)
    logits = 3 * torch.randn(ROWS, WIDTH, VOCABULARY, dtype=torch.float64, generator=generator)
    return logits, torch.randint(VOCABULARY, (ROWS, WIDTH), generator=generator)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
def test_equals_torch_over_full_logits(label_smoothing: float) -> None:
    logits, targets = logits_and_targets()
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    totals, counts = cross_entropy(
        logprobs,
        length_mask(torch.tensor(LENGTHS), WIDTH),
        label_smoothing,
        logits.log_softmax(-1).mean(-1),
    )
    assert counts.tolist() == list(LENGTHS)
    for row, length in enumerate(LENGTHS):
        slow = 0.0
        for t in range(length):
            normaliser = math.log(math.fsum(math.exp(x) for x in logits[row, t].tolist()))
            own = [x - normaliser for x in logits[row, t].tolist()]
            slow -= (1 - label_smoothing) * own[targets[row, t]]
            slow -= label_smoothing * math.fsum(own) / VOCABULARY
        assert float(totals[row]) == pytest.approx(slow, abs=1e-9)
        peer = torch.nn.functional.cross_entropy(
            logits[row, :length],
            targets[row, :length],
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        assert float(totals[row]) == pytest.approx(float(peer), abs=1e-9)


def test_padding_may_hold_anything() -> None:
    logits, targets = logits_and_targets()
    mask = length_mask(torch.tensor(LENGTHS), WIDTH)
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    clean, _ = cross_entropy(logprobs, mask)
    dirty, _ = cross_entropy(torch.where(mask, logprobs, torch.nan), mask)
    assert torch.equal(clean, dirty) and float(clean[2]) == 0.0


def test_smoothing_without_its_second_number_is_refused() -> None:
    with pytest.raises(AssertionError, match="mean log-prob"):
        cross_entropy(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.1)
