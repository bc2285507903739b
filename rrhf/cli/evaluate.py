"""`rrhf evaluate`: parse, call, print; the work is in `rrhf.evaluation.evaluate`."""

from __future__ import annotations

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.commands import next_step
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.evaluation.config import EvaluateConfig

    config = read_settings(EvaluateConfig, argv, "rrhf evaluate")
    from rrhf.evaluation.evaluate import evaluate
    from rrhf.evaluation.reached import reached
    from rrhf.report.table import terminal_table

    result = evaluate(config)
    print_once(terminal_table(result.rows))
    print_once(reached(result.rows))
    names = ", ".join(file.name for file in result.files)
    table = next_step("rrhf", "compare", config.output_dir)
    print_once(f"Rows: {names} in {config.output_dir}; `{table}` shows what was gained")
    return EXIT_DONE
