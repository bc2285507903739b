"""What every part of the programme is told, and what an item may answer."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import NotMeasured


@dataclass(frozen=True)
class Setting:
    """How the programme runs.

    Attributes:
        device: "cuda" or "cpu".
        tiny: small shapes, so that everything is gone through in a minute or two.
        scratch: folder for models and runs; it may be emptied between two programmes.
        peak_tflops: dense bfloat16 peak of the card; None = by its name.
        trl_path: folder that holds TRL 1.16; None = trl116/ in the repository, or the environment.
        trl_python: interpreter of an environment with TRL 1.10; None = that of trl-env/.
    """

    device: str
    tiny: bool
    scratch: str
    peak_tflops: float | None = None
    trl_path: str | None = None
    trl_python: str | None = None

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Setting:
        return cls(**json.loads(text))

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def folder(self, name: str) -> Path:
        """A folder below `scratch`, made where it is missing."""
        path = Path(self.scratch, name)
        path.mkdir(parents=True, exist_ok=True)
        return path


def require_gpu(setting: Setting) -> None:
    """Raises NotMeasured on a CPU."""
    if not setting.on_gpu:
        raise NotMeasured("needs a CUDA device")


def require_package(name: str, what_for: str) -> None:
    """Raises NotMeasured where a package is missing."""
    if importlib.util.find_spec(name) is None:
        raise NotMeasured(f"the package {name} is not installed, which {what_for} needs")


def check(passed: bool, line: str, **numbers: Any) -> dict[str, Any]:
    """The result of an item that may fail.

    Args:
        passed: whether it holds.
        line: what was found, for people.
        numbers: for machines.
    """
    return {"passed": passed, "line": line, **numbers}
