"""`rrhf score`: parse, call, print; what it does stands in `rrhf.scoring.stage`."""

from __future__ import annotations

from rrhf.cli.flags import parse_config
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.scoring.stage import ScoreConfig, score_file

    score_file(parse_config(ScoreConfig, argv, "rrhf score"))
    return EXIT_DONE
