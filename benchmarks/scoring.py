"""A reward model on the candidates of one prompt: every prompt once, against padded rows.

The rows go through the scorer's own way from ids to scores (`RowScorer`), finding out what they
share included. `row_by_row` is padded rows without any padding, one in each forward: on a CPU the
stronger of the two plain ways where a batch does not fit its caches. `_step` cases are a step of
reward training (forward and backward, all ordered pairs) instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForSequenceClassification

from benchmarks.harness import lines, timed
from benchmarks.shapes import SHAPES, Shape
from benchmarks.training_step import EXACT, TrainingStep, compared
from rrhf.models.reward_layouts import build_reward_model
from rrhf.models.reward_model import RewardModel
from rrhf.scoring.reward_model import RowScorer
from rrhf.training.methods.reward import RewardObjective
from rrhf.training.methods.reward_config import RewardLossSettings


@dataclass(frozen=True)
class Case:
    """A shape, scored or trained on; of the vocabulary only embeddings are there."""

    shape: Shape
    trains: bool = False

    def __str__(self) -> str:
        return f"{self.shape}, training" if self.trains else str(self.shape)

    def model(self) -> LlamaForSequenceClassification:
        """The same weights each time, with a head far from zero."""
        config = self.shape.config()
        config.num_labels = 1
        torch.manual_seed(0)
        model = LlamaForSequenceClassification._from_config(config, attn_implementation="sdpa")
        torch.nn.init.normal_(model.score.weight, std=self.shape.hidden**-0.5)
        return model

    def theory(self) -> float:
        """The ratio of floating-point operations; rows of one length need no mask, and then their
        attention is causal too."""
        shape, work = self.shape, self.shape.work()
        width, count = shape.prompt + max(shape.responses), len(shape.responses)
        masked = count * width**2 * 2 * shape.hidden * shape.layers
        is_even = len(set(shape.responses)) == 1
        return (work.rows_body - masked * is_even / 2) / work.body


CASES = {
    "N6": Case(SHAPES["S3"]),
    "ragged": Case(SHAPES["S5"]),
    "short_prompt": Case(replace(SHAPES["S6"], layers=6)),
    "N6_step": Case(SHAPES["S3"], trains=True),
}
GOALS = {"N6": 3.0, "N6_step": 3.0}
ROUNDS = {"N6_step": 3}


class RewardStep(TrainingStep):
    """-log sigmoid over all ordered pairs, on one batch."""

    def __init__(self, model: RewardModel, shape: Shape) -> None:
        super().__init__(model)
        self.batch = shape.batch([float(place) for place in range(len(shape.responses))])
        self.objective = RewardObjective(RewardLossSettings())

    def forward(self) -> Tensor:
        return self.objective(self.policy(self.batch), self.batch)["reward"].total


def run(case: str, rounds: int) -> dict[str, Any]:
    """Compare, then time.

    Raises:
        AssertionError: a variant gives other scores, or another loss or gradient.
    """
    chosen = CASES[case]
    calls, differences = _steps(chosen) if chosen.trains else _scorers(chosen)
    return {
        "benchmark": "scoring",
        "case": case,
        "shape": chosen,
        "theory": chosen.theory(),
        "relative_differences": differences,
        "timings": timed(calls, rounds, are_warm=True),
    }


def _steps(case: Case) -> tuple[dict[str, Callable[[], object]], dict[str, dict[str, float]]]:
    steps = {
        layout: RewardStep(build_reward_model(case.model(), layout), case.shape)
        for layout in ("padded", "shared_prefix")
    }
    return dict(steps), compared(steps)


def _scorers(case: Case) -> tuple[dict[str, Callable[[], object]], dict[str, dict[str, float]]]:
    batch = case.shape.batch()
    prompt = batch.prompt_ids[0].tolist()
    rows = [
        [*prompt, *ids[:length].tolist()]
        for ids, length in zip(batch.response_ids, batch.response_lengths, strict=True)
    ]
    asked = {"padded": 16384, "shared_prefix": 16384, "row_by_row": 1, "dense_mask": 16384}
    calls: dict[str, Callable[[], object]] = {}
    differences: dict[str, dict[str, float]] = {}
    expected = torch.zeros(0)
    for name, tokens in asked.items():
        layout = "padded" if name == "row_by_row" else name
        model = build_reward_model(case.model().requires_grad_(False), layout)
        scorer = RowScorer(model, pad_id=0, max_batch_tokens=tokens)
        calls[name] = partial(scorer.score_rows, rows)
        scores = torch.tensor(scorer.score_rows(rows))
        if name == "padded":
            expected = scores
            continue
        off = float((scores - expected).norm() / expected.norm())
        differences[name] = {"scores": off}
        assert off <= EXACT, f"{name} differs: {differences[name]}"
    return calls, differences


def table(result: dict[str, Any]) -> str:
    """For people."""
    head = f"{result['case']}: {result['shape']}; FLOP ratio {result['theory']:.2f}"
    return head + "\n" + lines(result["timings"], result["relative_differences"])
