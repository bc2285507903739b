"""A process that has imported what most tests need, and forks one run of pytest after the other.

Importing torch and transformers takes longer than most of these tests. What a fault may change,
the package itself, is imported by the fork alone; and a run that hangs is killed with every
process that it has started.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "safetensors.torch",
    "accelerate",
    "tokenizers",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
)


class Nursery:
    """Runs pytest in forks of a process of its own.

    Args:
        preloaded: what that process imports first.
    """

    def __init__(self, preloaded: Sequence[str] = PRELOADED) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *preloaded],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def pytest(
        self, folder: Path, arguments: Sequence[str], timeout_seconds: float
    ) -> tuple[int | None, str]:
        """Exit code, None where it took too long, and what was said, of pytest in a folder."""
        assert self._process.stdin is not None and self._process.stdout is not None
        log = folder.parent / "said.txt"
        asked = [str(folder), list(arguments), timeout_seconds, str(log)]
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that runs the tests is gone"
        return json.loads(answer), log.read_text(encoding="utf-8", errors="replace")

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process as process:
            process.kill()


def _serve(preloaded: Sequence[str]) -> None:
    import pytest

    for name in preloaded:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder, arguments, timeout_seconds, log = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_run(pytest, folder, arguments, log))
        answers.write(json.dumps(_wait(child, timeout_seconds)) + "\n")
        answers.flush()


def _run(pytest: Any, folder: str, arguments: Sequence[str], log: str) -> int:
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(descriptor, place)
    os.chdir(folder)
    os.environ["PYTHONPATH"] = folder
    sys.path[0] = folder  # where this script stood
    sys.argv[:] = ["pytest"]
    code = int(pytest.main(list(arguments)))
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _wait(child: int, timeout_seconds: float) -> int | None:
    end = time.monotonic() + timeout_seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):  # with every rank that a test has started
        os.killpg(child, signal.SIGKILL)
    if not found[0]:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(found[1])


if __name__ == "__main__":
    _serve(sys.argv[1:])
