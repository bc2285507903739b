"""`rrhf fetch`: parse, call, print; what it does stands in `rrhf.models.fetch`."""

from __future__ import annotations

from rrhf.cli.flags import parse_config
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.models.fetch import FetchConfig, fetch

    fetch(parse_config(FetchConfig, argv, "rrhf fetch"))
    return EXIT_DONE
