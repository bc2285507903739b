"""An objective's losses and metrics over held-out examples, without a step.

The same sums over the same global counts as in training, so a held-out loss and a training loss
mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.progress import Progress
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.streams import GROUPING_STEPS, OfflineStream
from rrhf.training.core.token_batches import TokenBudget
from rrhf.training.core.update import Objective


@torch.no_grad()
def measure(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[EncodedSet],
    pad_id: int,
    per_device_batch_size: int,
    parallel: Parallel,
    collate_fn: Callable[[Sequence[EncodedSet], int], TokenBatch] = collate,
    budget: TokenBudget | None = None,
) -> dict[str, float]:
    """One pass over all examples; every rank must call it and gets the same answer.

    Args:
        model: the prepared root, in eval mode.
        objective: whose terms and metrics.
        examples: held-out data.
        pad_id: filler of the batches.
        per_device_batch_size: prompts in one forward.
        parallel: ranks.
        collate_fn: as the training stream's.
        budget: tokens of one forward, instead of `per_device_batch_size` prompts.

    Returns:
        "loss", "<term>_loss" for each term, and the terms' metrics.
    """
    stream = OfflineStream(
        examples,
        pad_id,
        per_device_batch_size,
        1 if budget is None else GROUPING_STEPS,  # a longer stretch is cut better
        rank=parallel.rank,
        world_size=parallel.world_size,
        collate_fn=collate_fn,
        budget=budget,
    )
    losses: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    weights: dict[str, float] = {}
    told = 0
    with Progress("evaluate", len(examples), "example") as progress:
        for batch in (batch for batches in stream for batch in batches):
            # Counted where it was collated; a filler of another rank is no example.
            examples_done = int((batch.prompt_weights > 0).sum()) * parallel.world_size
            examples_done = min(examples_done, len(examples) - told)
            told += examples_done
            batch = batch.to(parallel.device)
            denominators = objective.denominators(batch)
            for name, term in objective(model(batch), batch).items():
                weights[name] = term.weight
                _add(losses, name, term.total, denominators[name])
                for key, (total, count) in term.metrics.items():
                    _add(metrics, key, total, count)
            progress.advance(examples_done)
    rows = [*losses.values(), *metrics.values()]
    summed = parallel.sum(torch.stack(rows))
    means = [float(total / count) if count else 0.0 for total, count in summed]
    by_term = dict(zip(losses, means[: len(losses)], strict=True))
    return {
        "loss": sum(weights[name] * value for name, value in by_term.items()),
        **{f"{name}_loss": value for name, value in by_term.items()},
        **dict(zip(metrics, means[len(losses) :], strict=True)),
    }


def _add(sums: dict[str, Tensor], name: str, total: Tensor, count: Tensor) -> None:
    pair = torch.stack([total.double().cpu(), count.double().cpu()])
    sums[name] = sums[name] + pair if name in sums else pair
