"""`rrhf evaluate`: parse, call, print; what it does stands in `rrhf.evaluation.evaluate`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.evaluation.config import EvaluateConfig

    config = read_settings(EvaluateConfig, argv, "rrhf evaluate")
    from rrhf.evaluation.evaluate import evaluate
    from rrhf.report.table import terminal_table

    result = evaluate(config)
    print_once(terminal_table(result.rows))
    for file in result.files:
        print_once(f"Row: {file}")
    return EXIT_DONE
