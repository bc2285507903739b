"""`rrhf generate`: parse, call, print; what it does stands in `rrhf.generation.stage`."""

from __future__ import annotations

from rrhf.cli.flags import parse_config
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.generation.stage import GenerateConfig, generate_file

    generate_file(parse_config(GenerateConfig, argv, "rrhf generate"))
    return EXIT_DONE
