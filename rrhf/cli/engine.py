"""`rrhf engine vllm start`: parse, print, start; the work is in `rrhf.generation.vllm.start`."""

from __future__ import annotations

import os
import sys

from rrhf.cli.menu import Menu
from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE

ENGINE_MENU = Menu(
    "rrhf engine",
    "engine",
    "Start a server for an engine that runs in a process of its own.",
    {"vllm": "a vLLM server, for --engine vllm"},
    ("", "`rrhf engine vllm start --help` lists its arguments."),
)
ACTION_MENU = Menu(
    "rrhf engine vllm",
    "action",
    "Start a vLLM server for --engine vllm.",
    {"start": "print the command that starts the server, and run it"},
    ("", "`rrhf engine vllm start --help` lists its arguments."),
)


def main(argv: list[str]) -> int:
    if ENGINE_MENU.is_shown(argv):
        return EXIT_DONE
    if argv[0] not in ENGINE_MENU.entries:
        raise ENGINE_MENU.unknown(argv[0])
    if ACTION_MENU.is_shown(argv[1:]):
        return EXIT_DONE
    if argv[1] not in ACTION_MENU.entries:
        raise ACTION_MENU.unknown(argv[1])
    return start(argv[2:])


def start(argv: list[str]) -> int:
    from pathlib import Path

    from rrhf.generation.vllm.start import StartVLLMConfig, run, server_command, write_served

    config = read_settings(StartVLLMConfig, argv, "rrhf engine vllm start")
    import torch

    python = config.python or os.environ.get("RRHF_VLLM_PYTHON") or sys.executable
    command = server_command(config, python, torch.cuda.is_available())
    print_once(command.as_text())
    print_once(f"Address: {command.url}; use it with --engine vllm --base_url {command.url}")
    if not config.dry_run:
        write_served(config, Path(command.words[command.words.index("--model") + 1]))
        run(command)
    return EXIT_DONE
