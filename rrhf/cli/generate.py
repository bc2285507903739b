"""`rrhf generate`: parse, call, print; what it does stands in `rrhf.generation.stage`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once, process_place
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.generation.config import GenerateConfig

    config = read_settings(GenerateConfig, argv, "rrhf generate")
    from rrhf.generation.stage import generate_file

    print_once(f"Candidates: {generate_file(config, *process_place())}")
    return EXIT_DONE
