"""The head in chunks says what a full table of logits says, and sends back the same gradients."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from rrhf.models.forward import head as head_module
from rrhf.models.forward.head import token_statistics
from rrhf.models.forward.logit_shape import LogitShape, logit_shape
from rrhf.models.forward.logprobs import LogprobOptions

M, H, V = 150, 16, 70
FORMS: dict[str, dict[str, int]] = {
    "stored": {},
    "recomputed": {"stored_bytes": 0, "chunk_bytes": 4 * V * 40},
}
SHAPES = [LogitShape(), LogitShape(0.7, None, 1.3), LogitShape(1.5, 2.0, 0.8)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a chunk is many, the last of them shorter."""
    monkeypatch.setattr(head_module, "TILE_BYTES", 4 * V * 7)


def case(
    dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        head.weight.normal_()
    hidden = torch.randn(M, H, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(V, (M,))


def asked_for(
    entropy: bool = False, mean: bool = False, has_gradient: bool = True
) -> LogprobOptions:
    return LogprobOptions(1.0, entropy, mean, has_gradient)


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor, shape: LogitShape) -> list[Tensor]:
    """The slow truth in float64: log-probs, entropies, mean log-probs."""
    z = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        z = z + head.bias.double()
    z = z * shape.scale
    if shape.softcap is not None:
        z = shape.softcap * torch.tanh(z / shape.softcap)
    logs = (z / shape.temperature).log_softmax(-1)
    return [
        logs.gather(-1, targets[:, None]).squeeze(-1),
        -(logs.exp() * logs).sum(-1),
        logs.mean(-1),
    ]


def weighted(parts: list[Tensor | None]) -> Tensor:
    """A different weight for each number; a third of the rows have none at all."""
    total = torch.zeros((), dtype=torch.float64)
    for number, part in enumerate(parts):
        if part is not None:
            weights = torch.cos(torch.arange(M, dtype=torch.float64) * (1 + number))
            total = total + (part.double() * weights * (torch.arange(M) % 3 > 0)).sum()
    return total


def relative(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "scaled", "capped"])
@pytest.mark.parametrize(
    ("entropy", "mean", "bias"), [(False, False, False), (True, True, True), (True, False, False)]
)
def test_equals_a_full_table(
    form: str, shape: LogitShape, entropy: bool, mean: bool, bias: bool
) -> None:
    hidden, head, targets = case(bias=bias)
    truth: list[Any] = plain(hidden, head, targets, shape)
    truth = [part for part, asked in zip(truth, (True, entropy, mean), strict=True) if asked]
    parameters = [hidden, *head.parameters()]
    expected = torch.autograd.grad(weighted(truth), parameters)
    found = token_statistics(hidden, head, targets, shape, asked_for(entropy, mean), **FORMS[form])
    parts = [found.logprobs, found.entropy, found.mean_logprobs]
    given = [part for part in parts if part is not None]
    for part, whole in zip(given, truth, strict=True):
        assert torch.allclose(part.double(), whole, atol=1e-5)
    weighted(given).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert relative(parameter.grad, gradient) < 1e-5


@pytest.mark.parametrize("watches_entropy", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "scaled", "capped"])
def test_a_frozen_head_multiplies_nothing_again(
    shape: LogitShape, watches_entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head, targets = case()
    head.requires_grad_(False)
    logprobs, entropy, _ = plain(hidden, head, targets, shape)
    expected = torch.autograd.grad(weighted([logprobs]), hidden)[0]
    found = token_statistics(
        hidden,
        head,
        targets,
        shape,
        asked_for(watches_entropy, has_gradient=False),
        **FORMS["recomputed"],
    )
    if watches_entropy:
        assert found.entropy is not None and not found.entropy.requires_grad
        assert torch.allclose(found.entropy.double(), entropy, atol=1e-5)
    monkeypatch.setattr(head_module, "_linear", None)
    weighted([found.logprobs]).backward()
    assert relative(hidden.grad, expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_an_entropy_that_is_only_watched_changes_no_gradient(form: str) -> None:
    hidden, head, targets = case()
    truth = plain(hidden, head, targets, SHAPES[2])
    expected = torch.autograd.grad(weighted(truth[:1]), [hidden, head.weight])
    found = token_statistics(
        hidden, head, targets, SHAPES[2], asked_for(True, has_gradient=False), **FORMS[form]
    )
    assert found.entropy is not None
    assert torch.allclose(found.entropy.double(), truth[1], atol=1e-5)
    weighted([found.logprobs]).backward()
    for parameter, gradient in zip([hidden, head.weight], expected, strict=True):
        assert relative(parameter.grad, gradient) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_gradient_are_skipped_exactly(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as a call that never saw them, and no work for them."""
    hidden, head, targets = case()
    rows = torch.arange(0, M, 5)
    alone = hidden.detach()[rows].requires_grad_()
    token_statistics(
        alone, head, targets[rows], LogitShape(), **FORMS[form]
    ).logprobs.sum().backward()
    expected, head.weight.grad = head.weight.grad, None

    seen = 0
    inner = head_module._Sums.add

    def counted(sums: Any, rows: Any, slopes: Tensor, *others: Any) -> None:
        nonlocal seen
        seen += len(slopes)
        inner(sums, rows, slopes, *others)

    monkeypatch.setattr(head_module._Sums, "add", counted)
    outputs = token_statistics(hidden, head, targets, LogitShape(), **FORMS[form])
    outputs.logprobs[rows].sum().backward()
    assert seen == len(rows)
    assert hidden.grad is not None and alone.grad is not None and expected is not None
    assert int((hidden.grad != 0).any(1).sum()) == len(rows)
    assert torch.allclose(hidden.grad[rows], alone.grad, atol=1e-6)
    assert torch.allclose(head.weight.grad, expected, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_second_backward_gives_the_same(form: str) -> None:
    hidden, head, targets = case()
    total = token_statistics(hidden, head, targets, LogitShape(), **FORMS[form]).logprobs.sum()
    once = torch.autograd.grad(total, [hidden, head.weight], retain_graph=True)
    for first, second in zip(once, torch.autograd.grad(total, [hidden, head.weight]), strict=True):
        assert torch.equal(first, second)


def test_a_second_backward_of_entropy_is_refused_rather_than_wrong() -> None:
    hidden, head, targets = case()
    entropy = token_statistics(hidden, head, targets, LogitShape(), asked_for(True)).entropy
    assert entropy is not None
    entropy.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        entropy.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_slope_of_a_confident_row_survives_half_precision(form: str) -> None:
    """Where P(target) is 0.99, 1 - P is rounded, never P: that would be a fifth of it away."""
    hidden, head, targets = case(torch.bfloat16)
    with torch.no_grad():
        hidden.mul_(0).add_(head.weight[targets] * 0.75)
    truth = plain(hidden, head, targets, LogitShape())[0]
    assert float(truth.exp().median()) > 0.97
    expected = torch.autograd.grad(truth.sum(), hidden)[0]
    token_statistics(hidden, head, targets, LogitShape(), **FORMS[form]).logprobs.sum().backward()
    assert relative(hidden.grad, expected) < 0.03


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("entropy", "mean"), [(False, False), (True, False), (False, True), (True, True)]
)
@pytest.mark.parametrize("count", [M, 0])
def test_nothing_active_gives_zeros(form: str, entropy: bool, mean: bool, count: int) -> None:
    """Every incoming gradient is zero, as of a filler micro-batch; or there are no rows at all."""
    hidden, head, targets = case(bias=True)
    found = token_statistics(
        hidden[:count], head, targets[:count], SHAPES[1], asked_for(entropy, mean), **FORMS[form]
    )
    given = [found.logprobs, found.entropy, found.mean_logprobs]
    total = sum((part * 0).sum() for part in given if part is not None)
    assert isinstance(total, Tensor)
    total.backward()
    for parameter in (hidden, *head.parameters()):
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(form: str, autocast: bool) -> None:
    """As near to the truth as the plain form in the same precision is (2^-8 relative)."""
    hidden, head, targets = case(torch.float32 if autocast else torch.bfloat16)
    truth = plain(hidden, head, targets, LogitShape())[0]
    expected = torch.autograd.grad(truth.sum(), [hidden, head.weight])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = token_statistics(hidden, head, targets, LogitShape(), **FORMS[form]).logprobs
    assert found.dtype == torch.float32
    assert float((found - truth).abs().max()) < 0.1  # logits reach 15, steps of bf16 there 1/16
    found.sum().backward()
    for parameter, gradient in zip([hidden, head.weight], expected, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        assert relative(parameter.grad, gradient) < 0.03


def test_a_weight_gradient_over_many_chunks_stays_in_float32() -> None:
    """Sums in bfloat16 would lose what one chunk adds to many: the error would grow with M."""
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(32 * 200, H, dtype=torch.bfloat16)
    targets = torch.randint(V, (len(hidden),))
    truth = plain(hidden, head, targets, LogitShape())[0]
    expected = torch.autograd.grad(truth.sum(), head.weight)[0]
    outputs = token_statistics(hidden, head, targets, LogitShape(), stored_bytes=0, chunk_bytes=1)
    outputs.logprobs.sum().backward()
    assert relative(head.weight.grad, expected) < 0.004


def test_no_gradient_keeps_nothing() -> None:
    hidden, head, targets = case()
    with torch.no_grad():
        found = token_statistics(hidden, head, targets, LogitShape())
    assert not found.logprobs.requires_grad
    assert torch.allclose(found.logprobs.double(), plain(hidden, head, targets, LogitShape())[0])


def test_shapes_of_known_families() -> None:
    assert logit_shape(LlamaConfig()) == LogitShape()
    assert logit_shape(Gemma2Config(), 0.5) == LogitShape(1.0, 30.0, 0.5)
    assert logit_shape(CohereConfig(logit_scale=0.25)) == LogitShape(0.25)
    assert logit_shape(GraniteConfig(logits_scaling=8.0)) == LogitShape(0.125)


def test_every_form_gives_the_same() -> None:
    hidden, head, targets = case()
    found = [
        token_statistics(hidden, head, targets, SHAPES[2], **form).logprobs
        for form in FORMS.values()
    ]
    for one, other in itertools.pairwise(found):
        assert torch.allclose(one, other, atol=1e-5)
