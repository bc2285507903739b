"""Masked sums and means against loops over the real positions alone."""

import math

import pytest
import torch

from rrhf.algorithms.masked import length_mask, masked_mean, masked_sum

LENGTHS = (3, 0, 5, 1)
WIDTH = 5


def values_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randn(len(LENGTHS), WIDTH, dtype=torch.float64, generator=torch.manual_seed(0))
    return values, length_mask(torch.tensor(LENGTHS), WIDTH)


def test_length_mask_is_true_for_the_first_positions() -> None:
    mask = length_mask(torch.tensor(LENGTHS), WIDTH)
    assert mask.tolist() == [[t < n for t in range(WIDTH)] for n in LENGTHS]
    grid = length_mask(torch.tensor([[2, 0], [1, 3]]), 3)
    assert grid.shape == (2, 2, 3) and grid.sum(-1).tolist() == [[2, 0], [1, 3]]


def test_sum_and_mean_equal_loops() -> None:
    values, mask = values_and_mask()
    for row, length in enumerate(LENGTHS):
        real = [float(values[row, t]) for t in range(length)]
        assert float(masked_sum(values, mask)[row]) == pytest.approx(math.fsum(real), abs=1e-12)
        mean = math.fsum(real) / length if length else 0.0
        assert float(masked_mean(values, mask)[row]) == pytest.approx(mean, abs=1e-12)
    everything = [float(values[r, t]) for r, n in enumerate(LENGTHS) for t in range(n)]
    whole = masked_mean(values, mask, dim=(0, 1))
    assert float(whole) == pytest.approx(math.fsum(everything) / len(everything), abs=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e300])
def test_padding_reaches_neither_value_nor_gradient(garbage: float) -> None:
    values, mask = values_and_mask()
    clean = values.clone().requires_grad_()
    dirty = torch.where(mask, values, torch.full_like(values, garbage)).requires_grad_()
    for function in (masked_sum, masked_mean):
        clean.grad = dirty.grad = None
        expected, got = function(clean, mask), function(dirty, mask)
        assert torch.equal(expected, got)
        expected.sum().backward()
        got.sum().backward()
        assert clean.grad is not None and dirty.grad is not None
        assert torch.equal(clean.grad, dirty.grad)


def test_a_mask_broadcasts_in_the_mean() -> None:
    values = torch.arange(6, dtype=torch.float64).reshape(2, 3)
    mask = torch.tensor([True, False, True])
    assert masked_mean(values, mask).tolist() == [1.0, 4.0]
    assert masked_mean(values, mask, dim=(0, 1)).item() == 2.5


def test_a_float_mask_is_refused() -> None:
    with pytest.raises(AssertionError, match="boolean"):
        masked_sum(torch.ones(2), torch.ones(2))
