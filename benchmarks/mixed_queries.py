"""An epoch of queries of mixed lengths: cut by tokens, against fixed batches of padded rows.

The baseline takes the queries as they come, four at a time, each batch padded to its longest row.
Against it stands the layout that computes every prompt once, cut by a token budget into the
micro-batches that `--max_tokens_per_batch` would make. All gradients of the epoch are added up, so
every variant must come to the same sum. As in `rrhf_step`, every pair of candidates is violated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import lines, timed
from benchmarks.original_step import OriginalStyle
from benchmarks.shapes import Shape
from benchmarks.training_step import TrainingStep, compared
from rrhf.data.collate import EncodedSet, collate
from rrhf.models.forward.layouts import build_policy
from rrhf.models.forward.logprobs import Policy
from rrhf.training.core.token_batches import (
    PADDED,
    SHARED,
    Size,
    TokenBudget,
    even_batches,
    micro_batches,
    tokens_of,
)
from rrhf.training.methods.objectives.rrhf import RRHF, RRHFSettings
from rrhf.training.methods.rank import RankObjective

QUERIES_OF_A_BATCH = 4


@dataclass(frozen=True)
class Lengths:
    """Tokens, log-normal about a median, within bounds."""

    median: float
    deviation: float
    least: int
    most: int

    def drawn(self, count: int, generator: torch.Generator) -> list[int]:
        lengths = self.median * torch.exp(self.deviation * torch.randn(count, generator=generator))
        whole: list[int] = lengths.round().int().clamp(self.least, self.most).tolist()
        return whole


@dataclass(frozen=True)
class Queries:
    """Queries of mixed lengths.

    Attributes:
        hidden, layers, vocabulary: of the model, as in `benchmarks.shapes`.
        prompts: tokens of each.
        responses: tokens of each query's responses.
    """

    hidden: int
    layers: int
    vocabulary: int
    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @classmethod
    def drawn(
        cls, model: tuple[int, int, int], seed: int, prompt: Lengths, response: Lengths
    ) -> Queries:
        """Twelve queries of four responses."""
        generator = torch.Generator().manual_seed(seed)
        prompts = prompt.drawn(12, generator)
        written = response.drawn(48, generator)
        return cls(
            *model, tuple(prompts), tuple(tuple(written[i : i + 4]) for i in range(0, 48, 4))
        )

    def __str__(self) -> str:
        written = [length for row in self.responses for length in row]
        return (
            f"H{self.hidden} L{self.layers} V{self.vocabulary // 1024}k, {len(self.prompts)} "
            f"queries, P{min(self.prompts)}..{max(self.prompts)} "
            f"R{min(written)}..{max(written)} N{len(self.responses[0])}"
        )

    @property
    def sizes(self) -> list[Size]:
        return [Size(*pair) for pair in zip(self.prompts, self.responses, strict=True)]

    @property
    def shapes(self) -> list[Shape]:
        """Each query by itself."""
        model = (self.hidden, self.layers, self.vocabulary)
        pairs = zip(self.prompts, self.responses, strict=True)
        return [Shape(*model, prompt, responses) for prompt, responses in pairs]

    def sets(self, scores: list[list[float]] | None = None) -> list[EncodedSet]:
        """The same random tokens each time."""
        generator = torch.Generator().manual_seed(1)

        def ids(length: int) -> list[int]:
            return torch.randint(3, self.vocabulary, (length,), generator=generator).tolist()

        found = [
            EncodedSet(ids(prompt), [ids(length) for length in responses])
            for prompt, responses in zip(self.prompts, self.responses, strict=True)
        ]
        if scores is None:
            return found
        return [replace(one, scores=row) for one, row in zip(found, scores, strict=True)]

    def theory(self) -> float:
        """The ratio of floating-point operations, fixed padded batches over every prompt once."""
        work = [shape.work() for shape in self.shapes]
        needed = sum(one.body + one.head for one in work)
        head, pair = self.hidden * self.vocabulary, 2 * self.hidden * self.layers
        weights = self.shapes[0].body_parameters + head
        batches = [[self.sizes[place] for place in places] for places in fixed(self)]
        return (
            sum(_padded_rows(batch) * (weights + _width(batch) * pair) for batch in batches)
            / needed
        )


def _width(sizes: Sequence[Size]) -> int:
    return max(size.prompt + max(size.responses) for size in sizes)


def _padded_rows(sizes: Sequence[Size]) -> int:
    """Tokens of the baseline: every row as wide as the longest."""
    return sum(len(size.responses) for size in sizes) * _width(sizes)


def fixed(case: Queries) -> list[list[int]]:
    """As they come."""
    return even_batches(len(case.prompts), QUERIES_OF_A_BATCH)[0]


def by_length(case: Queries) -> list[list[int]]:
    """As many at a time, similar ones together."""
    order = sorted(range(len(case.prompts)), key=lambda p: case.prompts[p] + max(case.responses[p]))
    return [[order[place] for place in places] for places in fixed(case)]


def budgeted(tokens: int, layout: str = SHARED) -> Callable[[Queries], list[list[int]]]:
    """As `--max_tokens_per_batch` cuts them."""
    return lambda case: micro_batches(case.sizes, TokenBudget(tokens, layout))[0]


def _shared(model: Any) -> nn.Module:
    return build_policy(model, "shared_prefix")


@dataclass(frozen=True)
class Variant:
    """A way to compute queries, a way to cut them, the tokens of a batch, and its products
    (`TrainingStep`)."""

    build: Callable[[Any], nn.Module]
    cut: Callable[[Queries], list[list[int]]]
    tokens: Callable[[Sequence[Size]], int] = lambda sizes: tokens_of(sizes, SHARED)
    usual_products: bool = False


VARIANTS = {
    "original": Variant(OriginalStyle, fixed, _padded_rows),
    "shared_prefix_2048": Variant(_shared, budgeted(2048)),
    "shared_prefix_2048_mkl": Variant(_shared, budgeted(2048), usual_products=True),
    "shared_prefix_alone": Variant(_shared, budgeted(1)),
    "shared_prefix_512": Variant(_shared, budgeted(512)),
    "shared_prefix_1024": Variant(_shared, budgeted(1024)),
    "shared_prefix_all": Variant(_shared, budgeted(1 << 30)),
    "padded_2048": Variant(Policy, budgeted(2048, PADDED), lambda sizes: tokens_of(sizes, PADDED)),
    "original_by_length": Variant(OriginalStyle, by_length, _padded_rows),
}
"""Their numbers are budgets; `alone` is a query at a time, `all` all of them at once."""

BASELINE = "original"
DEFAULT = tuple(VARIANTS)[1:]
SHOWN = {"long_prompts": ("shared_prefix_2048", "shared_prefix_alone")}

CASES = {
    "B9": Queries.drawn((256, 4, 8192), 66, Lengths(48, 0.6, 32, 256), Lengths(40, 0.4, 2, 256)),
    "long_prompts": Queries.drawn(
        (256, 4, 8192), 3, Lengths(128, 0.6, 32, 512), Lengths(32, 0.6, 2, 256)
    ),
}
GOALS = {"B9": 2.5}
ROUNDS = {"B9": 3, "long_prompts": 3}


class Epoch(TrainingStep):
    """All queries, micro-batch by micro-batch; gradients add up."""

    def __init__(
        self,
        policy: nn.Module,
        sets: Sequence[EncodedSet],
        cut: Sequence[Sequence[int]],
        usual_products: bool = False,
    ) -> None:
        super().__init__(policy, usual_products)
        self.batches = [collate([sets[place] for place in places], 0) for places in cut]
        self.objective = RankObjective(RRHF.build(RRHFSettings()))

    def __call__(self) -> Tensor:
        self.policy.zero_grad(set_to_none=True)
        whole = torch.zeros(())
        for batch in self.batches:
            with self.products():
                terms = self.objective(self.policy(batch), batch)
                loss = torch.stack([term.weight * term.total for term in terms.values()]).sum()
                loss.backward()
            whole += loss.detach()
        return whole


def run(case: str, rounds: int, variants: Sequence[str] = ()) -> dict[str, Any]:
    """Compare, then time.

    Raises:
        AssertionError: a variant comes to another loss or gradient than the baseline.
    """
    queries = CASES[case]
    sets, sizes = every_pair_violated(queries), queries.sizes
    asked = variants or SHOWN.get(case, DEFAULT)
    chosen = {name: VARIANTS[name] for name in dict.fromkeys([BASELINE, *asked])}
    cuts = {name: variant.cut(queries) for name, variant in chosen.items()}
    epochs = {
        name: Epoch(
            variant.build(queries.shapes[0].model()), sets, cuts[name], variant.usual_products
        )
        for name, variant in chosen.items()
    }
    differences = compared(epochs)
    return {
        "benchmark": "mixed_queries",
        "case": case,
        "shape": queries,
        "theory": queries.theory(),
        "batches": {name: len(cut) for name, cut in cuts.items()},
        "tokens": {
            name: sum(variant.tokens([sizes[place] for place in places]) for places in cuts[name])
            for name, variant in chosen.items()
        },
        "relative_differences": differences,
        "timings": timed(epochs, rounds, are_warm=True),
    }


def every_pair_violated(queries: Queries) -> list[EncodedSet]:
    """The queries, of each the likeliest response scored lowest."""
    policy = Policy(queries.shapes[0].model().eval())
    scores = []
    for one in queries.sets():
        batch = collate([one], 0)
        with torch.no_grad():
            logprobs = policy(batch).logprobs
        scores.append((-logprobs.sum(1) / batch.response_lengths).tolist())
    return queries.sets(scores)


def table(result: dict[str, Any]) -> str:
    """For people."""
    head = f"{result['case']}: {result['shape']}; FLOP ratio {result['theory']:.2f}"
    costs = ", ".join(
        f"{name} {tokens} in {result['batches'][name]}" for name, tokens in result["tokens"].items()
    )
    return f"{head}\n{lines(result['timings'], result['relative_differences'])}\n  tokens: {costs}"
