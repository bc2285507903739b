"""What reaches the terminal: one voice, whatever the number of processes."""

from __future__ import annotations

import logging
import os
import sys


def is_first_process() -> bool:
    """True in a single process, and in the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def print_once(text: str) -> None:
    """Print what a command has to show, at once, from the first process alone."""
    if is_first_process():
        print(text, flush=True)


def configure_logging() -> None:
    """The package's own messages go to stderr, one line each; other processes only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("rrhf").setLevel(logging.INFO if is_first_process() else logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_to_stderr)


def _to_stderr(record: logging.LogRecord) -> bool:
    """DeepSpeed writes to stdout from its import on, which is for results; say it on stderr.

    Not that it found no GPU: where it is merely installed, nobody has asked it to look for one.
    """
    if "Setting accelerator to CPU" not in record.getMessage():
        logging.getLogger().handle(record)
    return False


def process_place() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine), as a launcher such as torchrun says."""
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    rank, world_size, local_rank = (int(os.environ.get(*name)) for name in names)
    return rank, world_size, local_rank
