"""Builds the batches and the held-out evaluation of trainers on fixed data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import nn

from rrhf.data.collate import EncodedSet
from rrhf.errors import UserError
from rrhf.training.core.loop import Evaluate
from rrhf.training.core.measure import measure
from rrhf.training.core.setup import Workbench
from rrhf.training.core.streams import OfflineStream, StepCut
from rrhf.training.core.token_batches import TokenBudget, layout_of, sizes_of, warn_of_lone
from rrhf.training.core.update import Objective

logger = logging.getLogger(__name__)

WORTH_LEAVING = 1000
"""Smallest number of unused examples for which encoding is skipped.

Encoding fewer unused examples takes less than a second, and counts every cut.
"""


def step_cut(bench: Workbench, model: nn.Module) -> StepCut:
    """Define how optimiser steps are divided over ranks and micro-batches, by the run's settings.

    Args:
        bench: the opened run.
        model: the model to train, prepared or not; its layout decides how many tokens a batch
            costs.
    """
    config, parallel = bench.config, bench.parallel
    budget = None
    if config.max_tokens_per_batch is not None:
        layout = layout_of(model, config.model_max_length)
        budget = TokenBudget(config.max_tokens_per_batch, layout)
    return StepCut(
        bench.codec.pad_id,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        parallel.rank,
        parallel.world_size,
        budget,
    )


def is_short(bench: Workbench, num_sets: int) -> bool:
    """Whether a run uses so few examples that most sets need not be encoded.

    Args:
        bench: the opened run.
        num_sets: number of sets in the training data.
    """
    config = bench.config
    if config.max_steps < 1 or config.group_by_length or config.max_tokens_per_batch is not None:
        return False  # the batches depend on the lengths of all examples
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    used = config.max_steps * step * bench.parallel.world_size
    return num_sets - used >= WORTH_LEAVING and num_sets > 2 * used


def offline_stream(
    bench: Workbench, examples: Sequence[EncodedSet], model: nn.Module
) -> OfflineStream:
    """Build the stream of batches; the run's settings determine their order and size.

    Args:
        bench: the opened run.
        examples: the training examples.
        model: the model to train; its layout decides how many tokens a batch costs.

    Raises:
        UserError: the processes of the run have different examples.
    """
    config, cut = bench.config, step_cut(bench, model)
    stream = OfflineStream(
        examples,
        cut,
        config.num_train_epochs,
        config.max_steps,
        config.seed,
        config.group_by_length,
    )
    if cut.world_size > 1:
        found = bench.parallel.gather([stream.state_dict()])
        if any(one != found[0] for one in found):
            counts = ", ".join(str(one["examples"]) for one in found)
            raise UserError(
                f"the processes of this run read different training examples (their numbers: "
                f"{counts}); a data source must yield the same rows in every process: give its "
                "random numbers a fixed seed, and let it read the same files"
            )
    if cut.budget is not None:
        warn_of_lone(sizes_of(examples), cut.budget)
        logger.info("token batches: %s in the first step", stream.describe())
    return stream


def held_out_evaluation(
    bench: Workbench,
    objective: Objective,
    examples: Sequence[EncodedSet] | None,
    measured: Callable[..., dict[str, float]] = measure,
) -> Evaluate | None:
    """Build the function that the loop calls to evaluate; None without held-out examples.

    Args:
        bench: the opened run.
        objective: the training objective.
        examples: the held-out examples, or None.
        measured: computes the metrics; has the signature of `rrhf.training.core.measure.measure`.
    """
    if examples is None:
        return None

    def evaluate(model: nn.Module) -> dict[str, float]:
        return measured(
            model,
            objective,
            examples,
            step_cut(bench, model),
            bench.parallel,
        )

    return evaluate
