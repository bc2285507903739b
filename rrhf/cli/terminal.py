"""What reaches the terminal: one voice, whatever the number of processes."""

from __future__ import annotations

import logging
import os
import sys


def is_first_process() -> bool:
    """True in a single process, and in the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def print_once(text: str) -> None:
    """Print a command's result, from the first process alone."""
    if is_first_process():
        print(text)


def configure_logging() -> None:
    """The package's own messages go to stderr, one line each; other processes only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("rrhf").setLevel(logging.INFO if is_first_process() else logging.WARNING)
