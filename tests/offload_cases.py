"""What a process with a frozen model takes, while that is needed and while it is not."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from rrhf.training.core.offload import FileStore, Offload
from rrhf.training.core.phases import Phases, peak_meter


def measure(folder: str) -> None:
    """Write peaks.json: MiB before it was offloaded, while away, while in use again."""
    model = nn.Linear(4096, 4096, bias=False)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    offload = Offload({"freeze_model"}, FileStore(Path(folder) / "off"))
    phases = Phases(peak_meter(torch.device("cpu")), offload.enter)
    with phases("without"):
        model(torch.ones(1, 4096))
    offload.add_frozen(model, {"back"})
    with phases("away"):
        pass
    with phases("back"):
        model(torch.ones(1, 4096))
    peaks = {name: spent.peak_mib for name, spent in phases.total.items()}
    (Path(folder) / "peaks.json").write_text(json.dumps(peaks))
