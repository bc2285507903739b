"""A trainer on data that does not change: its stream, and its measuring on held-out examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from rrhf.data.collate import EncodedSet
from rrhf.training.measure import measure
from rrhf.training.setup import Workbench
from rrhf.training.streams import OfflineStream
from rrhf.training.update import Objective

Evaluate = Callable[[nn.Module], dict[str, float]]


def offline_stream(bench: Workbench, examples: Sequence[EncodedSet]) -> OfflineStream:
    """The examples in the order and the batches that the run's settings ask for."""
    config = bench.config
    return OfflineStream(
        examples,
        bench.codec.pad_id,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.num_train_epochs,
        config.max_steps,
        config.seed,
        bench.parallel.rank,
        bench.parallel.world_size,
        config.group_by_length,
    )


def held_out_evaluation(
    bench: Workbench,
    objective: Objective,
    examples: Sequence[EncodedSet] | None,
    measured: Callable[..., dict[str, float]] = measure,
) -> Evaluate | None:
    """What the loop calls to evaluate, or None where there is nothing to evaluate on.

    Args:
        bench: of the run.
        objective: of its training.
        examples: held out, or None.
        measured: the figures, called as `rrhf.training.measure.measure` is.
    """
    if examples is None:
        return None

    def evaluate(model: nn.Module) -> dict[str, float]:
        return measured(
            model,
            objective,
            examples,
            bench.codec.pad_id,
            bench.config.per_device_train_batch_size,
            bench.parallel,
        )

    return evaluate
