"""`python -m rrhf.cli.launch COMMAND...`: starts a launcher of ranks and ends as its ranks did.

torchrun and `accelerate launch` end with 1 however a rank ended, and after a signal leave 30 s for
what may be a checkpoint of many gigabytes. Here a signal is passed on once, the ranks get ten
minutes, their exit codes become one, and no process outlives the command. Standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rrhf.errors import EXIT_DONE, EXIT_FAULT, EXIT_USER_ERROR
from rrhf.process_end import END_FOLDER
from rrhf.signals import EXIT_CODES

SHUTDOWN_SECONDS = 600
"""What ranks have for their last checkpoint, unless TORCH_ELASTIC_SHUTDOWN_TIMEOUT says more or
less."""

FAILED_SECONDS = 20
"""What the other ranks have to end once one has failed, before all are killed."""

_LOOK_SECONDS = 0.05
_PR_SET_CHILD_SUBREAPER = 36


def launch(command: Sequence[str]) -> int:
    """Run a launcher to its end.

    SIGTERM and SIGINT are handed on to it, which hands them to its ranks; a second one kills all.

    Returns:
        0 where all ranks ended so; else, in this order, the code of a user's mistake, of a fault,
        of a signal.
    """
    _adopt_orphans()
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number if len(received) == 1 else signal.SIGKILL)
            if len(received) > 1:
                _end_orphans(signal.SIGKILL, 0)

    before = {number: signal.signal(number, hand_on) for number in EXIT_CODES}
    try:
        with tempfile.TemporaryDirectory(prefix="rrhf-ranks-") as folder:
            environment = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_SECONDS), **os.environ}
            environment[END_FOLDER] = folder
            # A session of its own: a terminal's Ctrl-C comes through here, once.
            started = subprocess.Popen(command, env=environment, start_new_session=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
            process = started
            came_before = bool(received)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
            if came_before:
                started.send_signal(received[0])
            failed_at = math.inf
            while (status := started.poll()) is None:
                time.sleep(_LOOK_SECONDS)  # a wait that a signal just missed would not hear of it
                if failed_at == math.inf and _has_failed(Path(folder)):
                    failed_at = time.monotonic()
                if time.monotonic() - failed_at > FAILED_SECONDS:
                    started.kill()
                    _end_orphans(signal.SIGKILL, 0)
                    failed_at = math.inf
            patience = float(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
            _end_orphans(received[0] if received else signal.SIGTERM, patience)
            codes = [int(path.read_text() or EXIT_FAULT) for path in Path(folder).iterdir()]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return _code_of(codes, status, received)


def _has_failed(folder: Path) -> bool:
    """Whether a rank ended in a way in which the others cannot save any more."""
    failures = {str(EXIT_FAULT), str(EXIT_USER_ERROR)}
    return any(path.read_text() in failures for path in folder.iterdir())


def _code_of(codes: Sequence[int], status: int, received: Sequence[int]) -> int:
    """One code of the ranks' (a killed one has a fault's), the launcher's and the signals."""
    for code in (EXIT_USER_ERROR, EXIT_FAULT):
        if code in codes:
            return code
    for code in codes:
        if code != EXIT_DONE:
            return code
    if codes and received:
        return EXIT_DONE  # they had come to their end before it reached them
    if status != EXIT_DONE and received:
        return EXIT_CODES[received[0]]
    return status if 0 <= status <= 255 else EXIT_FAULT


def _adopt_orphans() -> None:
    """On Linux, processes whose parent dies become children of this one."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_orphans(number: int, patience_seconds: float) -> None:
    """End what the launcher left behind, for instance because it was killed itself."""
    asked: set[int] = set()
    deadline = time.monotonic() + patience_seconds
    while left := _children():
        is_over = time.monotonic() >= deadline
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                if is_over or pid not in asked:
                    os.kill(pid, signal.SIGKILL if is_over else number)
            asked.add(pid)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(_LOOK_SECONDS)


def _children() -> list[int]:
    file = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python -m rrhf.cli.launch COMMAND ...", file=sys.stderr)
        return EXIT_USER_ERROR
    try:
        code = launch(sys.argv[1:])
        if code != EXIT_DONE:  # a launcher ends with a long account of itself
            said = "what the ranks said stands above the launcher's own account"
            print(f"the ranks have ended with exit code {code}; {said}", file=sys.stderr)
        return code
    except FileNotFoundError as error:
        print(f"error: {error.filename}: no such command", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
