"""`rrhf fetch`: parse, call, print; the work is in `rrhf.models.fetch`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.models.fetch import FetchConfig, fetch

    print_once(f"Model: {fetch(read_settings(FetchConfig, argv, 'rrhf fetch'))}")
    return EXIT_DONE
