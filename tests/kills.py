"""Kill a job at a chosen moment, many times, at the price of one import.

`Zygote` starts one Python process that imports torch and the job's module once; each `run` forks a
child from it that does the job and may be killed after some seconds, at its n-th file operation
below a folder, or before the n-th call of a function. Fresh processes matter: torch forbids a
backward pass in a child of a process that has already done one.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

TESTS = Path(__file__).resolve().parent


def child_environment() -> dict[str, str]:
    """For a process that imports from tests/, and the package from where this one has it."""
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


class Zygote:
    """A parent of killable jobs.

    Args:
        job: "module:function" importable from tests/ or the package; called with `arguments`.
        arguments: JSON values.
    """

    def __init__(self, job: str, arguments: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), job, json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
        )
        assert self._answer()["ready"]

    def run(
        self,
        kill_after_seconds: float | None = None,
        kill_at_operation: int | None = None,
        folder: Path | str | None = None,
        number: int = signal.SIGKILL,
        kill_at_call: tuple[str, int] | None = None,
    ) -> dict[str, Any]:
        """Do the job once.

        Args:
            kill_after_seconds, kill_at_operation: when to kill it; by default not at all.
            folder: whose file operations count.
            number: of the signal that comes after some seconds.
            kill_at_call: "module:function" or "module:Class.method", and which call of it.

        Returns:
            {"signal": n or 0, "exit": code or None, "seconds": s, "operations": operations seen
            below `folder` if the job came to its end}.
        """
        order = {
            "after": kill_after_seconds,
            "operation": kill_at_operation,
            "folder": str(folder) if folder else None,
            "number": int(number),
            "call": kill_at_call,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("ANSWER "):
                answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
                return answer
        raise AssertionError("the parent of the jobs died; its message is above")

    def __enter__(self) -> Zygote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()


class OperationCounter:
    """Counts file operations below a folder in this process, and dies before a chosen one.

    Python's own calls come through the audit hook; writers in native code (safetensors, torch.save)
    and fsync are wrapped, and a native write is also cut in half before the death.
    """

    _events = frozenset({"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"})

    def __init__(self, folder: str, die_at: int | None) -> None:
        self.count = 0
        self._folder = folder
        self._die_at = die_at

    def install(self) -> None:
        sys.addaudithook(self._hook)
        fsync = os.fsync

        def counted_fsync(handle: int) -> None:
            self._tick()
            fsync(handle)

        os.fsync = counted_fsync
        checkpoint = importlib.import_module("rrhf.training.checkpoint")
        for name, place in (("save_file", 1), ("_save_torch", 1)):
            setattr(checkpoint, name, self._halved(getattr(checkpoint, name), place))

    def _halved(self, write: Any, place: int) -> Any:
        def written(*args: Any, **kwargs: Any) -> None:
            self._tick()
            write(*args, **kwargs)
            if self._die_at == self.count + 1:
                path = Path(args[place])
                os.truncate(path, path.stat().st_size // 2)
            self._tick()

        return written

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in self._events and args and isinstance(args[0], (str, os.PathLike)):
            if not str(args[0]).startswith(self._folder):
                return
            is_read = event == "open" and isinstance(args[1], str) and "r" in args[1]
            if not (is_read and "+" not in str(args[1])):
                self._tick()

    def _tick(self) -> None:
        self.count += 1
        if self.count == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)


def _serve() -> None:
    module, _, function = sys.argv[1].partition(":")
    arguments = json.loads(sys.argv[2])
    import torch

    torch.set_num_threads(1)
    job = getattr(importlib.import_module(module), function)
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        read_end, write_end = os.pipe()
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(read_end)
            _do(job, arguments, order, write_end)
        os.close(write_end)
        if order["after"] is not None:
            _kill_later(child, order["after"], order["number"])
        _, status = os.waitpid(child, 0)
        with os.fdopen(read_end) as pipe:
            told = pipe.read()
        _say(
            {
                "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
                "exit": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
                "seconds": time.monotonic() - started,
                "operations": int(told or 0),
            }
        )


def _do(job: Any, arguments: dict[str, Any], order: dict[str, Any], write_end: int) -> None:
    counter = None
    if order["folder"]:
        counter = OperationCounter(order["folder"], order["operation"])
        counter.install()
    if order["call"]:
        _die_before_call(*order["call"])
    code = 0
    try:
        job(**arguments)
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        if code == 1:
            import traceback

            traceback.print_exc()
    os.write(write_end, str(counter.count if counter else 0).encode())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die_before_call(target: str, number: int) -> None:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for step in classes:
        owner = getattr(owner, step)
    function, calls = getattr(owner, name), itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


def _kill_later(child: int, seconds: float, number: int) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.001)
    os.kill(child, number)


def _say(answer: dict[str, Any]) -> None:
    print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
