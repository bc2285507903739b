"""Ends a process cleanly: flushes output, and skips interpreter shutdown in a rank.

Gloo's threads outlive `destroy_process_group` and may ask for the interpreter's lock while the
interpreter ends. CPython 3.11 answers by unwinding such a thread, through code that forbids it
("terminate called without an active exception"): the work is done, but the process has crashed. A
process that is one of several therefore skips that stage. Standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from rrhf.errors import EXIT_DONE, EXIT_FAULT

END_FOLDER = "RRHF_RANK_ENDS"
"""Environment variable: the folder in which each rank notes its exit code."""


def run_process(work: Callable[[], int | None]) -> NoReturn:
    """Run the program and end the process: the last call of a program.

    Args:
        work: returns the exit code (None = done); an error ends the process with its traceback.
    """
    note_end("")
    try:
        code = work()
    except SystemExit as end:
        code = end.code if end.code is None or isinstance(end.code, int) else EXIT_FAULT
        if code is not end.code:
            print(end.code, file=sys.stderr)
    except BaseException:
        if not is_one_of_several():
            raise
        traceback.print_exc()
        code = EXIT_FAULT
    end_process(EXIT_DONE if code is None else code)


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, once everything is written.

    Functions registered with `atexit` run, and both streams are flushed, in every case. SIGTERM has
    no effect from here on.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note_end(str(code))
    if not is_one_of_several():
        sys.exit(code)
    try:
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader is gone, or it is closed
                stream.flush()
        os._exit(code)


def note_end(text: str) -> None:
    """Tell our launcher (`rrhf.cli.launch`), if there is one, that this rank is alive, or its exit
    code: torchrun and accelerate return the same code however their ranks end."""
    if folder := os.environ.get(END_FOLDER):
        Path(folder, f"rank-{os.environ.get('RANK', '0')}").write_text(text)


def launched_place() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine), as a launcher such as torchrun sets it."""
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    rank, world_size, local_rank = (int(os.environ.get(*name)) for name in names)
    return rank, world_size, local_rank


def is_one_of_several() -> bool:
    """True where a launcher started several processes, or this one has joined others."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return True
    distributed = sys.modules.get("torch.distributed")
    return (
        distributed is not None
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )
