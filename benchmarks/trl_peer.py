"""Log-probs through the fused head of TRL 1.16, on padded rows, as its trainers ask for them.

TRL is never needed by the package. It comes from the environment, or from a folder that is named or
stands as trl116/ in the root of the repository:

    pip install --no-deps --target trl116 'trl==1.16.*'

Without a Triton device that head scores every position of a row, the prompt's too, and computes
the logits once more in the backward pass; with one it scores the labelled positions alone.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness import ROOT, NotMeasured
from benchmarks.original_step import right_padded
from rrhf.data.collate import TokenBatch
from rrhf.models.forward.logprobs import PolicyOutputs

FOLDER = ROOT / "trl116"
SETTINGS = {
    "trl_path": "folder that holds TRL 1.16: pip install --no-deps --target FOLDER 'trl==1.16.*'"
}


class FusedHeadRows(nn.Module):
    """Takes the place of a policy: every response a row with its whole prompt."""

    def __init__(self, model: PreTrainedModel, trl_path: str | None = None) -> None:
        super().__init__()
        load(trl_path).add_fused_lm_head(model)
        self.model = model

    def forward(self, batch: TokenBatch) -> PolicyOutputs:
        ids, is_attended, picked = right_padded(batch)
        labels = ids.new_full(ids.shape, -100)
        columns = (picked + 1).clamp_min(0)
        valid = picked >= 0
        rows = valid.nonzero(as_tuple=True)[0]
        labels[rows, columns[valid]] = ids[rows, columns[valid]]
        found = self.model(
            input_ids=ids, attention_mask=is_attended, labels=labels, fused_lm_head=True
        ).log_probs  # [N, L - 1]
        chosen = found.gather(1, picked.clamp_min(0))
        return PolicyOutputs(chosen.masked_fill(~valid, 0.0))


def load(trl_path: str | None = None) -> Any:
    """The module of TRL that holds the head.

    Raises:
        NotMeasured: it is not there, or is another version.
    """
    folder = trl_path or str(FOLDER)
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        module = import_module("trl.trainer.utils")
    except ImportError as error:
        raise NotMeasured(f"TRL 1.16 is not there ({error}); --trl_path names its folder") from None
    if not hasattr(module, "add_fused_lm_head"):
        raise NotMeasured(f"TRL {version()} has no fused head; 1.16 has")
    return module


def version() -> str:
    """Of the TRL that was found."""
    return str(import_module("trl").__version__)
