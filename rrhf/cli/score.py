"""`rrhf score`: parse, call, print; the work is in `rrhf.scoring.stage`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.commands import next_step
from rrhf.errors import EXIT_DONE
from rrhf.process_end import launched_place


def main(argv: list[str]) -> int:
    from rrhf.scoring.config import ScoreConfig

    config = read_settings(ScoreConfig, argv, "rrhf score")
    from rrhf.scoring.stage import score_file

    output = score_file(config, *launched_place())
    words = ["--model_name_or_path", "MODEL", "--data_path", output, "--output_dir", "RUN"]
    step = next_step("rrhf", "train", "rank", *words)
    print_once(f"Scored candidates: {output}; `{step}` trains on them")
    return EXIT_DONE
