"""Evaluations, models and checkpoints without a training, as a function that tests kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rrhf.files import write_json
from rrhf.training.core.best import BestModel
from rrhf.training.core.config import TrainingConfig
from rrhf.training.core.model_folders import ModelFolders, Weights
from rrhf.training.core.parallel import Parallel

LOSSES = (5.0, 4.0, 6.0, 3.0, 2.0)
"""Of steps 1, 2, ...; a checkpoint follows every second."""


def keeper(run: Path, **changes: Any) -> BestModel:
    """Of a model that is one file, which says the step that it is of."""
    kept = BestModel(
        run,
        ModelFolders({"policy": write_nothing, "value": write_nothing}),
        TrainingConfig("model", str(run), **changes),
        Parallel(),
    )
    models = {name: _writer(kept, name) for name in ("policy", "value")}
    kept._models = ModelFolders(models)
    return kept


def write_nothing(folder: Path, beside: Path, weights: Weights) -> None:
    """Stands in until the keeper is there to be asked for the step."""


def _writer(kept: BestModel, name: str) -> Any:
    def write(folder: Path, beside: Path, weights: Weights) -> None:
        (folder / "weights").write_text(f"{name} of step {kept.step}")

    return write


def weights_of(run: Path) -> list[str]:
    return [(run / "best" / name / "weights").read_text() for name in ("policy", "value")]


def run_to_the_end(folder: str, losses: list[float] | None = None) -> None:
    """A run, or its continuation from its checkpoint."""
    run = Path(folder)
    run.mkdir(parents=True, exist_ok=True)
    checkpoint = run / "checkpoint.json"
    state: dict[str, Any] = {"step": 0, "best": {}}
    if checkpoint.exists():
        state = json.loads(checkpoint.read_text())
    kept = keeper(run)
    kept.load_state_dict(state["best"])
    for step, loss in enumerate(losses or LOSSES, start=1):
        if step <= state["step"]:
            continue
        kept.judge(step, {"loss": loss})
        if step % 2 == 0:
            write_json(checkpoint, {"step": step, "best": kept.state_dict()})
            kept.settle()
    write_json(run / "manifest.json", {"best": kept.describe()})
    kept.settle()
