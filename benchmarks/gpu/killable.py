"""`rrhf` as a command that ends itself at a chosen step, in torch's deterministic mode.

    python -m benchmarks.gpu.killable STEP COUNT_FILE train rank --model_name_or_path ...

Before the given optimiser step (counted from 1 in this process; 0 = never) it sends itself SIGKILL,
as the kernel would. At the end it writes how many steps it took into the file.

On CUDA torch refuses one thing of ours in that mode, `cumsum` of floating-point numbers, since a
single row goes by a scan without a fixed order. Several rows do not, so there every sum is taken of
two equal rows, outside that rule. All else stays under it, and raises where no fixed order exists.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.child import die_with_parent

ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",  # asks transformers' own calls of flash-attn
}


def deterministic() -> None:
    """Bits that do not depend on the order in which threads end."""
    torch.use_deterministic_algorithms(True)
    plain = torch.Tensor.cumsum

    def cumsum(self: Tensor, dim: int, **more: Any) -> Tensor:
        if not (self.is_cuda and self.is_floating_point()):
            return plain(self, dim, **more)
        assert dim < 0, "counted from the end, so that one dimension more in front does no harm"
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            return plain(torch.stack([self, self]), dim, **more)[0]
        finally:
            torch.use_deterministic_algorithms(True)

    torch.Tensor.cumsum = cumsum  # type: ignore[method-assign, assignment]


def main(step: int, count_file: Path, arguments: list[str]) -> int:
    """The exit code of the command, if it comes to its end."""
    from rrhf.cli.main import main as command
    from rrhf.training.core.parallel import Parallel

    deterministic()
    taken = 0
    take_step = Parallel.take_step

    def counted(self: Parallel, *args: Any, **kwargs: Any) -> float:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(self, *args, **kwargs)

    Parallel.take_step = counted  # type: ignore[method-assign]
    try:
        return int(command(arguments))
    finally:
        count_file.write_text(json.dumps({"steps": taken}))


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
