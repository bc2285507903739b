"""`python -m rrhf.cli.launch COMMAND...`: runs a launcher and returns the exit code of its ranks.

torchrun and `accelerate launch` return 1 however a rank ended, and after a signal they give the
ranks 30 s, too little for a checkpoint of many gigabytes. This module passes a signal on once,
gives the ranks ten minutes, combines their exit codes into one, and leaves no process running.
Standard library only.
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
"""Seconds that ranks get for their last checkpoint after a signal; the environment variable
TORCH_ELASTIC_SHUTDOWN_TIMEOUT overrides it."""

FAILED_SECONDS = 20
"""Seconds that the other ranks get to end after one rank failed; then all are killed."""

_LOOK_SECONDS = 0.05
_PR_SET_CHILD_SUBREAPER = 36


def launch(command: Sequence[str]) -> int:
    """Run a launcher until it ends.

    SIGTERM and SIGINT are passed to the launcher, which passes them to its ranks. A second signal
    kills all of them.

    Returns:
        0 if all ranks returned 0. Otherwise the first that applies: the exit code of a user's
        mistake, of a fault, of a signal.
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
            # In a new session, so that Ctrl-C reaches the launcher only through `hand_on`, once.
            started = subprocess.Popen(command, env=environment, start_new_session=True)
            signal.pthread_sigmask(signal.SIG_BLOCK, EXIT_CODES)
            process = started
            came_before = bool(received)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, EXIT_CODES)
            if came_before:
                started.send_signal(received[0])
            failed_at = math.inf
            while (status := started.poll()) is None:
                time.sleep(_LOOK_SECONDS)  # a blocking wait could miss a signal
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
    """Whether a rank failed, after which the other ranks cannot write a checkpoint."""
    failures = {str(EXIT_FAULT), str(EXIT_USER_ERROR)}
    return any(path.read_text() in failures for path in folder.iterdir())


def _code_of(codes: Sequence[int], status: int, received: Sequence[int]) -> int:
    """Combine the exit codes of the ranks and the launcher's status into one exit code.

    A rank that was killed counts as a fault.
    """
    for code in (EXIT_USER_ERROR, EXIT_FAULT):
        if code in codes:
            return code
    for code in codes:
        if code != EXIT_DONE:
            return code
    if codes and received:
        return EXIT_DONE  # the ranks had finished before the signal reached them
    if status != EXIT_DONE and received:
        return EXIT_CODES[received[0]]
    return status if 0 <= status <= 255 else EXIT_FAULT


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies (Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_orphans(number: int, patience_seconds: float) -> None:
    """End the processes that the launcher left behind, for instance because it was killed.

    Args:
        number: the signal to send first.
        patience_seconds: the time until processes that still run are killed.
    """
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
        if code != EXIT_DONE:  # a launcher ends with a long report of its own
            said = "the messages of the ranks are above the launcher's own report"
            print(f"the ranks have ended with exit code {code}; {said}", file=sys.stderr)
        return code
    except FileNotFoundError as error:
        print(f"error: {error.filename}: no such command", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
