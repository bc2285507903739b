"""A step against arithmetic by hand: on one rank and on two, cut in any way, stopped in time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_threads import on_ranks
from safetensors.torch import load_file
from torch import Tensor
from update_cases import RATE, SETS, WEIGHTS, Table, Terms

from rrhf.data.collate import EncodedSet, TokenBatch, TokenExperience, collate
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.update import NonFiniteError, Term, Update

FILLER = replace(SETS[1], weight=0.0)


def by_hand(weights: list[float]) -> tuple[dict[str, float], list[float]]:
    """The row of metrics and the gradient of a step over all of SETS."""
    tokens = [token for s in SETS for ids in s.response_ids for token in ids]
    square = sum(weights[token] ** 2 for token in tokens) / len(tokens)
    total = sum(weights[token] for token in tokens) / (3 / 8)
    gradient = [
        sum(2 * weights[t] / len(tokens) + 0.5 / (3 / 8) for t in tokens if t == place)
        for place in range(4)
    ]
    row = {
        "loss": square + 0.5 * total,
        "square_loss": square,
        "sum_loss": total,
        "none_loss": 0.0,
        "length": len(tokens) / 4,
        "share": 0.5,
        "never": 0.0,
        "grad_norm": math.hypot(*gradient),
    }
    return row, gradient


CUTS: dict[str, list[list[list[EncodedSet]]]] = {
    "at once": [[SETS]],
    "in two": [[SETS[:1], SETS[1:]]],
    "in three and a filler": [[[SETS[2]], [SETS[0]], [SETS[1]], [FILLER]]],
    "on two ranks": [[SETS[:2]], [SETS[2:]]],
    "on two ranks, in two": [[[SETS[0]], [SETS[1]]], [[SETS[2]], [FILLER]]],
    "on two ranks, one with nothing": [[SETS, [FILLER]], [[FILLER], [FILLER]]],
}


def steps(
    cut: list[list[list[EncodedSet]]], folder: Path, count: int = 1, limit: float = 0.0, **more: Any
) -> tuple[list[Any], list[Table]]:
    """What each rank's last step returns, or raises; and the models afterwards."""
    models = [Table() for _ in cut]
    objective = more.get("objective", Terms())

    def work(rank: int, parallel: Parallel) -> Any:
        optimizer = torch.optim.SGD(models[rank].parameters(), RATE)
        update = Update(models[rank], optimizer, objective, parallel, limit, folder)
        batches = [collate(sets, 0) for sets in cut[rank]]
        return [update(batches, number + 1) for number in range(count)][-1]

    return on_ranks(list(models), work), models


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_step_is_that_of_the_arithmetic_however_it_is_cut(
    cut: list[list[list[EncodedSet]]], tmp_path: Path
) -> None:
    weights = list(WEIGHTS)
    for _ in range(2):  # nothing of the first step's gradient may stay for the second
        wanted, gradient = by_hand(weights)
        weights = [w - RATE * slope for w, slope in zip(weights, gradient, strict=True)]
    outcomes, models = steps(cut, tmp_path, count=2)
    for outcome, model in zip(outcomes, models, strict=True):
        row, num_tokens = outcome
        assert row == pytest.approx(wanted, rel=1e-5, abs=1e-6)
        assert row["share"] == 0.5  # a count below one divides as it is
        assert num_tokens == 1 + 2 + 1 + 1 + 2 + 3 + 3 + 1  # each row with its prompt, no filler
        assert model.weight.tolist() == pytest.approx(weights, rel=1e-5)


@pytest.mark.parametrize("name", ["at once", "on two ranks, in two"])
def test_gradients_are_scaled_down_to_the_largest_norm_and_no_further(
    name: str, tmp_path: Path
) -> None:
    wanted, gradient = by_hand(list(WEIGHTS))
    norm = wanted["grad_norm"]
    for limit, scale in ((norm / 4, 0.25), (norm * 4, 1.0), (0.0, 1.0)):
        outcomes, models = steps(CUTS[name], tmp_path, limit=limit)
        assert outcomes[0][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        moved = [w - RATE * scale * g for w, g in zip(WEIGHTS, gradient, strict=True)]
        assert models[0].weight.tolist() == pytest.approx(moved, rel=1e-4)


class Broken(Terms):
    """On the batch with token 2 alone: a loss, or a gradient, that is not finite."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, outputs: Tensor, batch: TokenBatch) -> dict[str, Term]:
        terms = super().__call__(outputs, batch)
        if batch.response_ids.flatten().tolist() == [2]:
            bad = {
                "loss is inf": outputs.sum() * math.inf,
                "loss is nan": outputs.sum() * math.nan,
                "norm is inf": (outputs - outputs.detach()).sum().sqrt(),  # steep at zero
                "norm is nan": (0 * outputs).sum().sqrt(),
            }[self.what]
            terms["square"] = replace(terms["square"], total=terms["square"].total + bad)
        return terms


WHAT = ("loss is inf", "loss is nan", "norm is inf", "norm is nan")


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", ["in three and a filler", "on two ranks, in two"])
def test_what_is_not_finite_stops_all_ranks_before_the_weights_change(
    name: str, what: str, tmp_path: Path
) -> None:
    outcomes, models = steps(CUTS[name], tmp_path, objective=Broken(what))
    for rank, (outcome, model) in enumerate(zip(outcomes, models, strict=True)):
        assert isinstance(outcome, NonFiniteError), outcome
        assert str(outcome).startswith("step 1: the ")
        assert model.weight.tolist() == pytest.approx(WEIGHTS)
        assert (tmp_path / f"non_finite_step_1_rank_{rank}.safetensors").is_file()
    told = f"the {what}".replace("norm", "gradient norm")
    assert any(told in str(outcome) for outcome in outcomes), outcomes


def test_all_of_a_batch_that_is_not_finite_is_written_out(tmp_path: Path) -> None:
    stored = TokenExperience(torch.tensor([-3.0]), torch.tensor([5.0]))
    one = EncodedSet([7, 7], [[2]], experience=[stored])
    outcomes, _ = steps([[[SETS[0]], [one]]], tmp_path, objective=Broken("loss is nan"))
    assert isinstance(outcomes[0], NonFiniteError)
    written = load_file(tmp_path / "non_finite_step_1_rank_0.safetensors")
    assert written["prompt_ids"].tolist() == [[7, 7]]
    assert written["response_ids"].tolist() == [[2]]
    assert written["extra.old_logprobs"].tolist() == [[-3.0]]
    assert written["extra.advantages"].tolist() == [[5.0]]


class Weighted(Terms):
    """Terms whose weight differs between micro-batches, as demonstrations beside experience."""

    def __call__(self, outputs: Tensor, batch: TokenBatch) -> dict[str, Term]:
        terms = super().__call__(outputs, batch)
        terms["sum"] = replace(terms["sum"], weight=float(batch.prompt_ids.max()))
        return terms


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_each_micro_batch_enters_the_logged_loss_by_its_own_weight(
    order: tuple[int, int], tmp_path: Path
) -> None:
    """Weights 9 and 8 by the prompts; tokens 1, 2, 3 and 0, 0, 1 and 2 over 3/8."""
    parts = [SETS[:1], SETS[1:]]
    outcomes, _ = steps([[parts[place] for place in order]], tmp_path, objective=Weighted())
    row = outcomes[0][0]
    first, second = (
        sum(WEIGHTS[t] for t in tokens) / (3 / 8) for tokens in ((1, 2, 3), (0, 0, 1, 2))
    )
    assert row["sum_loss"] == pytest.approx(first + second)
    assert row["loss"] == pytest.approx(row["square_loss"] + 9.0 * first + 8.0 * second)


class Sparse(Terms):
    """A term that the first prompts do not have."""

    def denominators(self, batch: TokenBatch) -> dict[str, Tensor]:
        return self._kept(super().denominators(batch), batch)

    def __call__(self, outputs: Tensor, batch: TokenBatch) -> dict[str, Term]:
        return self._kept(super().__call__(outputs, batch), batch)

    def _kept(self, found: dict[str, Any], batch: TokenBatch) -> dict[str, Any]:
        return {n: v for n, v in found.items() if n != "sum" or int(batch.prompt_ids.max()) < 9}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_term_that_only_some_micro_batches_have_is_logged_whatever_comes_last(
    order: tuple[int, int], tmp_path: Path
) -> None:
    parts = [SETS[:1], SETS[1:]]
    outcomes, _ = steps([[parts[place] for place in order]], tmp_path, objective=Sparse())
    row = outcomes[0][0]
    total = sum(WEIGHTS[t] for t in (0, 0, 1, 2)) / (2 / 8)
    assert row["sum_loss"] == pytest.approx(total)
    assert row["loss"] == pytest.approx(row["square_loss"] + 0.5 * total)
    assert not any(name.startswith("term:") for name in row)
