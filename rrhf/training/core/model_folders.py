"""The models of a run as plain folders: the last ones, and those that are kept in addition.

A trainer says once how its models are written (`ModelFolders`); the end of the run and the loop
call it. A folder is staged and moved into place whole, so what stands under its own name is whole.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rrhf.errors import NonFiniteError, UserError
from rrhf.models.finite import non_finite_in_folder
from rrhf.staged_folders import remove_unfinished, saved_folder
from rrhf.training.core.parallel import Parallel

Weights = dict[str, Tensor] | None
"""The trained module's weights in full on the main rank, where each rank holds shards of them; None
where the module itself has them."""

WriteModel = Callable[[Path, Path, Weights], None]
"""Fills an empty folder. Given: the folder, the one that holds the models written before it, and
the weights."""

_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class ModelFolders:
    """What a training leaves.

    Attributes:
        writers: by the folder's name, in the order of writing; the first is the run's main model.
        unmeasured: those of them that an evaluation does not look at, such as an average.
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
        """Put every model into a folder, each whole or not at all; every rank must call it.

        Raises:
            UserError: no space, or the place cannot be written; on every rank.
        """
        weights = full_weights(parallel)
        failure: Exception | None = None
        if parallel.is_main:
            try:
                for name, write in self.writers.items():
                    saved_folder(into / name, _bound(write, into, weights))
            except Exception as error:
                failure = error
        if parallel.any(failure is not None):
            raise failure or UserError(f"{into}: process 0 could not write a model; it says why")


def full_weights(parallel: Parallel) -> Weights:
    """The module's weights in full where they are spread, else None; every rank must call it."""
    return parallel.full_state_dict() if parallel.is_sharded else None


class PolicyHistory:
    """The main model as it was every so many steps, as folders `policies/step-000010`.

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
                _bound(write, self.folder, weights),
            )
        self._parallel.barrier()

    def cut_back(self, step: int) -> None:
        """Forget the models of later steps, as the metrics are cut back on resuming."""
        if not (self._parallel.is_main and self.folder.is_dir()):
            return
        remove_unfinished(self.folder)
        for path in self.folder.iterdir():
            found = _STEP.fullmatch(path.name)
            if found and int(found.group(1)) > step:
                shutil.rmtree(path)


def write_finite(write: WriteModel, folder: Path, beside: Path, weights: Weights) -> None:
    """Fill a model folder, and look at what stands in it then.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    write(folder, beside, weights)
    if (found := non_finite_in_folder(folder)) is not None:
        raise NonFiniteError(
            f"{beside}: a model is not kept, because its weights are not finite (first: {found}); "
            "lower --learning_rate"
        )


def _bound(write: WriteModel, beside: Path, weights: Weights) -> Callable[[Path], None]:
    return lambda staged: write_finite(write, staged, beside, weights)
