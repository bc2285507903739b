"""The models of a run as plain folders: the last ones, and those that are kept in addition.

A trainer defines once how its models are written (`ModelFolders`); the loop and the end of the run
use it. A folder is staged and then moved into place, so a folder under its own name is complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from rrhf.errors import NonFiniteError, UserError
from rrhf.models.finite import non_finite_in_folder
from rrhf.staged_folders import remove_folder, remove_unfinished, saved_folder
from rrhf.training.core.parallel import Parallel

Weights = dict[str, Tensor] | None
"""All weights of a sharded module, on the main rank; None if the module itself has them whole."""

WriteModel = Callable[[Path, Path, Weights], None]
"""Fills an empty folder; called with it, the folder of earlier models, and the weights."""

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class ModelFolders:
    """The models of a training, and how they are written.

    Attributes:
        writers: by the folder's name, in the order of writing; the first is the run's main model.
        unmeasured: names of those that evaluations do not measure, such as an average.
    """

    writers: Mapping[str, WriteModel]
    unmeasured: tuple[str, ...] = ()

    @property
    def main(self) -> str:
        """The name of the main model's folder."""
        return next(iter(self.writers))

    @property
    def measured(self) -> list[str]:
        """The models that an evaluation measures, in the order of writing."""
        return [name for name in self.writers if name not in self.unmeasured]

    def write(self, parallel: Parallel, into: Path) -> None:
        """Write every model into a folder, each completely or not at all; every rank must call it.

        Raises:
            UserError: no space, or the place cannot be written; on every rank.
        """
        weights = full_weights(parallel)
        failure: Exception | None = None
        if parallel.is_main:
            try:
                for name, write in self.writers.items():
                    saved_folder(
                        into / name, partial(write_finite, write, beside=into, weights=weights)
                    )
            except Exception as error:
                failure = error
        if parallel.any(failure is not None):
            raise failure or UserError(f"{into}: process 0 could not write a model; it says why")


def full_weights(parallel: Parallel) -> Weights:
    """All weights of a sharded module, else None; every rank must call it."""
    return parallel.full_state_dict() if parallel.is_sharded else None


class PolicyHistory:
    """The main model at regular steps, as folders `policies/step-000010`.

    Args:
        folder: of the run.
        models: of the trainer.
        parallel: ranks.
    """

    def __init__(self, folder: Path, models: ModelFolders, parallel: Parallel) -> None:
        plural = "policies" if models.main == "policy" else f"{models.main}s"
        self.folder = folder / plural
        self._models, self._parallel = models, parallel

    def save(self, step: int) -> None:
        """Write the model of this step; every rank must call it."""
        weights = full_weights(self._parallel)
        if self._parallel.is_main:
            write = self._models.writers[self._models.main]
            self.folder.mkdir(exist_ok=True)
            saved_folder(
                self.folder / f"step-{step:06d}",
                partial(write_finite, write, beside=self.folder, weights=weights),
            )
        self._parallel.barrier()

    def cut_back(self, step: int) -> None:
        """Remove the models of later steps, as the metrics are truncated on resuming."""
        if not (self._parallel.is_main and self.folder.is_dir()):
            return
        remove_unfinished(self.folder)
        for path in self.folder.iterdir():
            found = _STEP.fullmatch(path.name)
            if found and int(found.group(1)) > step:
                remove_folder(path)


def write_finite(write: WriteModel, folder: Path, beside: Path, weights: Weights) -> None:
    """Fill a model folder, and check that the weights in it are finite.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    write(folder, beside, weights)
    if (found := non_finite_in_folder(folder)) is not None:
        raise NonFiniteError(
            f"{beside}: a model is not kept, because its weights are not finite (first: {found}); "
            "lower --learning_rate"
        )
