"""Programs that are let run piece by piece, so that rounds of them can interleave.

A program that needs an environment of its own, or that keeps its loop to itself, runs in a process
that stops at a gate between two pieces of its work; what is timed is its CPU time from gate to
gate. Nothing here needs a package: the other side may lack all of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """A process on its way from gate to gate.

    Args:
        command: whose program has a `Gate`; it runs in the root of the repository.
        env: beside the environment of this process.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            list(command),
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()

    def piece(self) -> dict[str, Any]:
        """Let it do one piece; returns `seconds` of CPU time and what else it tells of it.

        Raises:
            RuntimeError: it ended; the text holds its last words.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._said.seek(0)
            raise RuntimeError(f"the worker ended: {self._said.read()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


class Gate:
    """The worker's side: make one before anything is printed, call it between two pieces.

    Attributes:
        clock: seconds; CPU time of the process, unless the program takes another.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.process_time
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what the program prints is no answer
        self._started: float | None = None

    def __call__(self, **facts: Any) -> None:
        """Tell what the piece cost that ends here, wait for the next; ends the program at last."""
        if self._started is not None:
            seconds = self.clock() - self._started
            print(json.dumps({"seconds": seconds, **facts}), file=self._answers, flush=True)
        if not sys.stdin.readline():
            raise SystemExit
        self._started = self.clock()
