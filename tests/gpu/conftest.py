"""The tests for a GPU: marked `gpu`, skipped with the reason where there is none.

`RRHF_GPU_TESTS_ON_CPU=1` runs their bodies on the CPU, all but what only a GPU's kernels can do, so
that a mistake in a test is not found only where a card is at hand. `python -m benchmarks gpu` runs
them with everything else.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device() -> str:
    """ "cuda"; or "cpu" where that is asked for."""
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("RRHF_GPU_TESTS_ON_CPU"):
        return "cpu"
    pytest.skip("needs a CUDA device")


@pytest.fixture
def cuda() -> str:
    """ "cuda", for what a CPU cannot do in any form."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"
