"""Normalisers against numpy over the whole stream, and against the closed form of the average."""

import json
import math

import numpy
import pytest
import torch

from rrhf.algorithms.normalizers import (
    NORMALIZER_TYPES,
    ExponentialMovingAverage,
    Moments,
    RunningMeanStd,
    build_normalizer,
    normalize,
    normalizer_from_state,
)


def stream(sizes: list[int]) -> list[torch.Tensor]:
    generator = torch.manual_seed(11)
    return [5 + 3 * torch.randn(n, dtype=torch.float64, generator=generator) for n in sizes]


@pytest.mark.parametrize("sizes", [[1, 4, 7], [1, 1, 1], [16], [3, 0, 2, 100]])
def test_running_mean_std_equals_numpy_over_the_whole_stream(sizes: list[int]) -> None:
    normalizer = RunningMeanStd()
    seen = numpy.zeros(0)
    for batch in stream(sizes):
        normalizer.update(batch)
        seen = numpy.concatenate([seen, batch.numpy()])
        if len(seen) > 1:
            assert normalizer.mean == pytest.approx(numpy.mean(seen), abs=1e-12)
            assert normalizer.std == pytest.approx(numpy.std(seen), abs=1e-12)
            unbiased = numpy.std(seen, ddof=1)
            assert abs(normalizer.std - unbiased) > 1e-6  # the control: n - 1 would be noticed
    assert normalizer.count == sum(sizes)


def test_merging_is_stable_far_from_zero() -> None:
    # sum of squares minus square of the sum would lose every digit here: 1e9 ** 2 * 2 ** -53 > 100
    batches = [1e9 + batch for batch in stream([50, 1, 50])]
    normalizer = RunningMeanStd()
    for batch in batches:
        normalizer.update(batch)
    assert normalizer.std == pytest.approx(numpy.std(torch.cat(batches).numpy()), rel=1e-6)


def test_moments_merge_in_any_order_as_ranks_do() -> None:
    parts = [Moments.of(batch) for batch in stream([5, 1, 0, 9])]
    left, right = Moments(), Moments()
    for part in parts:
        left = left.merge(part)
    for part in reversed(parts):
        right = right.merge(part)
    assert left.count == right.count == 15
    assert left.mean == pytest.approx(right.mean, abs=1e-12)
    assert left.squared_deviations == pytest.approx(right.squared_deviations, abs=1e-10)


def test_moving_average_equals_its_closed_form() -> None:
    momentum, batches = 0.8, stream([4, 6, 2, 5])
    normalizer = ExponentialMovingAverage(momentum)
    for batch in batches:
        normalizer.update(batch)
    last = len(batches) - 1
    weights = [momentum**last] + [
        (1 - momentum) * momentum ** (last - k) for k in range(1, len(batches))
    ]
    assert math.fsum(weights) == pytest.approx(1.0)
    means = [numpy.mean(batch.numpy()) for batch in batches]
    variances = [numpy.var(batch.numpy(), ddof=1) for batch in batches]
    assert normalizer.mean == pytest.approx(numpy.dot(weights, means), abs=1e-12)
    assert normalizer.std**2 == pytest.approx(numpy.dot(weights, variances), abs=1e-12)
    swapped = [(1 - momentum) ** last] + [
        momentum * (1 - momentum) ** (last - k) for k in range(1, len(batches))
    ]
    assert abs(normalizer.mean - numpy.dot(swapped, means)) > 1e-3  # the control: m on the batch


@pytest.mark.parametrize("normalizer_type", NORMALIZER_TYPES)
def test_a_first_batch_of_one_is_survived(normalizer_type: str) -> None:
    normalizer = build_normalizer(normalizer_type)
    assert (normalizer.mean, normalizer.std, normalizer.count) == (0.0, 1.0, 0)
    normalizer.update(torch.tensor([7.0]))
    assert (normalizer.mean, normalizer.std, normalizer.count) == (7.0, 1.0, 1)
    scores = normalize(torch.tensor([7.0, 9.0]), normalizer.mean, normalizer.std)
    assert scores.tolist() == pytest.approx([0.0, 2.0])
    normalizer.update(torch.tensor([5.0, 9.0]))
    assert math.isfinite(normalizer.std) and normalizer.std > 1


def test_a_batch_of_one_leaves_the_moving_variance_alone() -> None:
    normalizer = ExponentialMovingAverage(0.5)
    normalizer.update(torch.tensor([0.0, 2.0]))
    before = normalizer.std
    normalizer.update(torch.tensor([5.0]))
    assert normalizer.std == before and normalizer.mean == 3.0


@pytest.mark.parametrize("normalizer_type", NORMALIZER_TYPES)
def test_state_survives_a_config_file_exactly(normalizer_type: str) -> None:
    straight, resumed = build_normalizer(normalizer_type, 0.7), build_normalizer(normalizer_type)
    batches = stream([1, 5, 3, 8])
    for batch in batches:
        straight.update(batch)
    for cut in range(len(batches) + 1):
        resumed = build_normalizer(normalizer_type, 0.7)
        for batch in batches[:cut]:
            resumed.update(batch)
        resumed = normalizer_from_state(json.loads(json.dumps(resumed.state_dict())))
        for batch in batches[cut:]:
            resumed.update(batch)
        assert resumed.state_dict() == straight.state_dict()


def test_normalize_functions() -> None:
    scores = torch.tensor([1.0, 3.0], dtype=torch.float64)
    assert normalize(scores, 1.0, 2.0).tolist() == pytest.approx([0.0, 1.0])
    assert normalize(scores, 1.0, 2.0, "scale").tolist() == pytest.approx([0.5, 1.5])
    assert normalize(scores, 1.0, 2.0, "identity") is scores
    assert normalize(scores, 1.0, 0.0).isfinite().all()


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="RunningMeanStd, ExponentialMovingAverage"):
        build_normalizer("Batch")
    with pytest.raises(ValueError, match="affine, scale, identity"):
        normalize(torch.zeros(1), 0.0, 1.0, "rank")
