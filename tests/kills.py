"""Kill a job at a chosen moment, many times, at the price of one import.

One Python process for all tests of a worker imports torch and the jobs' modules once, and loads a
model once, which imports and compiles more. Each `Zygote.run` forks a child from it that does the
job and may be killed after some seconds, at its n-th file operation below a folder, or before the
n-th call of a function. That process computes nothing: torch forbids a backward pass in a child of
a process that has already done one.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import importlib.util
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from places import FOLDERS

from rrhf import signals
from rrhf.errors import EXIT_STOPPED_BY_SIGTERM


def child_environment() -> dict[str, str]:
    """For a process that imports from tests/, and the package from where this one has it."""
    paths = [*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


class Zygote:
    """A parent of killable jobs.

    Args:
        job: "module:function" importable from tests/ or the package; called with `arguments`.
        arguments: JSON values.
    """

    def __init__(self, job: str, arguments: dict[str, Any]) -> None:
        self._job = {"job": job, "arguments": arguments}

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
        return self._ask(
            after=kill_after_seconds,
            operation=kill_at_operation,
            folder=str(folder) if folder else None,
            number=int(number),
            call=kill_at_call,
        )

    def run_ranks(self, count: int = 2) -> list[int]:
        """Do the job in processes that know of each other as the ranks of a launcher do.

        Returns:
            The exit code of each, minus the number of the signal where one ended it.
        """
        codes: list[int] = self._ask(ranks=count)["exits"]
        return codes

    def _ask(self, **how: Any) -> dict[str, Any]:
        order = {**self._job, **how, "environment": child_environment(), "place": os.getcwd()}
        if _parent().poll() is not None:
            _end_parent()
        process = _parent()
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return _answer(process)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:  # perhaps with an answer on its way, which belongs to nobody else
            _end_parent()


@functools.cache
def _parent() -> subprocess.Popen[str]:
    """The process that forks the jobs of all zygotes; it ends with the orders that it reads."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    assert _answer(process)["ready"]
    atexit.register(_end_own_parent, os.getpid())
    return process


def _end_own_parent(owner: int) -> None:
    """At the end of this process; a fork of it that runs its exit functions leaves it alone."""
    if os.getpid() == owner:
        _end_parent()


def _end_parent() -> None:
    if _parent.cache_info().currsize:
        _parent().kill()
        _parent().communicate()
        _parent.cache_clear()


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.startswith("ANSWER "):
            answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
            return answer
    raise AssertionError("the parent of the jobs died; its message is above")


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
        checkpoint = importlib.import_module("rrhf.training.core.checkpoint")
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
    _warm_up()
    _say({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        module, _, function = order["job"].partition(":")
        job = getattr(importlib.import_module(module), function)
        if "ranks" in order:
            _say({"exits": _ranks(job, order)})
            continue
        read_end, write_end = os.pipe()
        started = time.monotonic()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until the child can answer it
        child = os.fork()
        if child == 0:
            os.close(read_end)
            _killable(job, order, write_end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
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


def _warm_up() -> None:
    """What every job would import and compile again in its child: half a second of each."""
    import torch
    from tiny import save_tiny

    from rrhf.models.loading import load_causal_lm

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        load_causal_lm(save_tiny(Path(folder) / "model"))
    if importlib.util.find_spec("deepspeed"):
        importlib.import_module("deepspeed")  # as accelerate does where it is installed


def _ranks(job: Any, order: dict[str, Any]) -> list[int]:
    """Their port is held until they are gone; the first may listen on it, as this one does not."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
        known |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(order["ranks"]))
        children = []
        for rank in range(order["ranks"]):
            order["environment"] |= known | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(os.fork())
            if children[-1] == 0:
                os._exit(_do(job, order))
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _killable(job: Any, order: dict[str, Any], write_end: int) -> None:
    counter = None
    if order["folder"]:
        counter = OperationCounter(order["folder"], order["operation"])
        counter.install()
    if order["call"]:
        _die_before_call(*order["call"])
    code = _do(job, order)
    os.write(write_end, str(counter.count if counter else 0).encode())
    os._exit(code)


def _do(job: Any, order: dict[str, Any]) -> int:
    """The job, in the child; its exit code."""
    gc.freeze()  # what the parent has imported stays, and is long to look through for garbage
    os.environ.clear()
    os.environ.update(order["environment"])
    os.chdir(order["place"])
    code = 0
    try:
        with signals.sigterm_interrupts():  # as every command is under from its first moment on
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
            job(**order["arguments"])
    except signals.Interrupted:
        code = EXIT_STOPPED_BY_SIGTERM
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        if code == 1:
            import traceback

            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


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
