"""Models that a run keeps during training: at regular steps, and the best.

The loop reports steps, evaluations and checkpoints to it; it decides what to write, when the
evaluations have stopped improving, and what to discard on resuming.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.training.core.best import BestModel
from rrhf.training.core.config import TrainingConfig
from rrhf.training.core.model_folders import ModelFolders, PolicyHistory
from rrhf.training.core.parallel import Parallel

logger = logging.getLogger(__name__)


class KeptModels:
    """Every rank must make every call.

    Args:
        folder: of the run.
        models: writes the trained models; None keeps nothing.
        config: says what to keep.
        parallel: ranks.
        is_evaluated: whether the run has held-out data.

    Attributes:
        best: None if evaluations are not compared.

    Raises:
        UserError: --load_best_model_at_end or --early_stopping_patience without an evaluation.
    """

    def __init__(
        self,
        folder: Path,
        models: ModelFolders | None,
        config: TrainingConfig,
        parallel: Parallel,
        is_evaluated: bool,
    ) -> None:
        self._every = config.save_policy_steps
        self._history: PolicyHistory | None = None
        self.best: BestModel | None = None
        is_judged = is_evaluated and config.eval_steps > 0
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(config, name) and not is_judged:
                raise UserError(
                    f"--{name}: nothing is evaluated on the way; give held-out data and "
                    "--eval_steps"
                )
        if models is not None:
            self._history = PolicyHistory(folder, models, parallel)
            if is_judged and config.judges_evaluations:
                self.best = BestModel(folder, models, config, parallel)

    @property
    def is_over(self) -> bool:
        """Whether the evaluations have not improved for as long as the patience allows."""
        return self.best is not None and self.best.is_exhausted

    def after_step(self, step: int) -> None:
        if self._history is not None and self._every > 0 and step % self._every == 0:
            self._history.save(step)

    def after_evaluation(self, step: int, evaluation: Mapping[str, float]) -> None:
        """Compare an evaluation with the best; one without figures is not counted."""
        if self.best is None or not evaluation:
            return
        self.best.judge(step, evaluation)
        if self.is_over:
            logger.info(
                "stopping at step %d: %d evaluations without gain over %s %.6g of step %s",
                step,
                self.best.evaluations_without_gain,
                self.best.metric,
                self.best.value,
                self.best.step,
            )

    def after_checkpoint(self) -> None:
        if self.best is not None:
            self.best.settle()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.best is None else self.best.state_dict()

    def cut_back(self, step: int, state: Mapping[str, Any]) -> None:
        """Remove what was written after `step`, whose checkpoint has `state` (empty: all)."""
        if self._history is not None:
            self._history.cut_back(step)
        if self.best is not None:
            self.best.load_state_dict(state)
