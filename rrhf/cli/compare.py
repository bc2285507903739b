"""`rrhf compare`: parse, call, print; what it does stands in `rrhf.report.compare`."""

from __future__ import annotations

from rrhf.cli.flags import parse_config
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.report.compare import CompareConfig, compare

    print_once(compare(parse_config(CompareConfig, argv, "rrhf compare")).text)
    return EXIT_DONE
