"""Controls what is printed on the terminal, for any number of processes.

A message is shown once; repeated warnings are counted and reported at the end. Warnings of
libraries about their own code are hidden, because users of a command cannot act on them; Python's
switches (-W, PYTHONWARNINGS) show them again.
"""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections import Counter
from typing import Any

from rrhf.process_end import launched_place

_PROGRESS = "rrhf.progress"
_OWN_SHARE = ("rrhf.generation.local.engine", "rrhf.scoring.function", "rrhf.scoring.reward_model")
# Warnings of torch.cuda are shown: they concern the machine, such as a driver that is too old.
_LIBRARIES = r"(?!torch\.cuda)(accelerate|datasets|deepspeed|peft|torch|transformers)(\.|$)"


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return launched_place().is_main


def print_once(text: str) -> None:
    """Print a result on stdout and flush it; only the first process prints."""
    if is_first_process():
        print(text, flush=True)


class Voice(logging.StreamHandler[Any]):
    """Writes each message of rrhf once, above the progress bars; counts repetitions."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter("%(message)s"))
        self._warned: Counter[str] = Counter()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("rrhf") and record.name != _PROGRESS:
            text = record.getMessage()
            self._warned[text] += record.levelno >= logging.WARNING
            if text in self._said:
                return
            self._said.add(text)
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=sys.stderr):
            super().emit(record)

    def print_repeats(self) -> None:
        """Print each warning that was repeated, with its count; then reset the counts."""
        for text, times in self._warned.items():
            if times > 1:
                self.stream.write(f"this warning came {times} times: {text}\n")
        self._warned.clear()
        self._said.clear()


def configure_logging() -> None:
    """Send the package's own messages to stderr, one line each.

    In processes other than the first, only modules that report on their own share of the work may
    warn; the other warnings would repeat those of the first process.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, handlers=[Voice()])
    logging.getLogger("rrhf").setLevel(logging.INFO if is_first_process() else logging.ERROR)
    for name in () if is_first_process() else _OWN_SHARE:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_to_stderr)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=_LIBRARIES)


def show_progress_alone() -> None:
    """Show only warnings and progress of the stages; for studies, which print their own lines."""
    logging.getLogger("rrhf").setLevel(logging.WARNING)
    logging.getLogger(_PROGRESS).setLevel(logging.INFO)


def print_repeats() -> None:
    """Print each warning that was repeated, with its count; call this at the end of a command."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Voice):
            handler.print_repeats()


def _to_stderr(record: logging.LogRecord) -> bool:
    """Redirect DeepSpeed's messages to stderr, since stdout is for results.

    DeepSpeed's message that no GPU was found is hidden, since DeepSpeed may be installed but not
    used.
    """
    if "Setting accelerator to CPU" not in record.getMessage():
        logging.getLogger().handle(record)
    return False
