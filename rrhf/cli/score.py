"""`rrhf score`: parse, call, print; the work is in `rrhf.scoring.stage`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once, process_place
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.scoring.config import ScoreConfig

    config = read_settings(ScoreConfig, argv, "rrhf score")
    from rrhf.scoring.stage import score_file

    print_once(f"Scored candidates: {score_file(config, *process_place())}")
    return EXIT_DONE
