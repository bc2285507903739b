"""Metrics to a tracker, where one is asked for; a tracker that fails never stops a training."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.training.config import TrainingConfig

logger = logging.getLogger(__name__)


class Tracker:
    """Sends rows to one tracker; without one it does nothing."""

    def __init__(
        self,
        log: Callable[[dict[str, float], int], None] | None = None,
        finish: Callable[[], None] | None = None,
    ) -> None:
        self._log = log
        self._finish = finish

    def log(self, row: dict[str, float], step: int) -> None:
        """Send a row; the first failure is said and ends the sending."""
        if self._log is None:
            return
        try:
            self._log(row, step)
        except Exception as error:  # the training is worth more than its curve
            logger.warning("the tracker failed and is switched off: %s", error)
            self._log = None

    def close(self) -> None:
        """Let the tracker finish."""
        if self._finish is None:
            return
        try:
            self._finish()
        except Exception as error:
            logger.warning("the tracker failed while closing: %s", error)


def build_tracker(config: TrainingConfig, folder: Path, is_main: bool) -> Tracker:
    """The tracker of `--report_to`, on the main rank.

    Raises:
        UserError: its package is not installed.
    """
    if not is_main or config.report_to == "none":
        return Tracker()
    if config.report_to == "tensorboard":
        module = _import("torch.utils.tensorboard", "tensorboard")
        writer = module.SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(row: dict[str, float], step: int) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, step)

        return Tracker(to_tensorboard, writer.close)
    module = _import(config.report_to, config.report_to)
    module.init(project="rrhf", name=folder.name, config=config.as_dict())

    def to_run(row: dict[str, float], step: int) -> None:
        module.log(row, step=step)

    return Tracker(to_run, module.finish)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"--report_to: the package {package} is not installed; pip install {package}, or leave "
            "the flag out (metrics.jsonl is always written)"
        ) from error
