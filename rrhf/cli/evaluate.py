"""`rrhf evaluate`: parse, call, print; what it does stands in `rrhf.evaluation.evaluate`."""

from __future__ import annotations

from rrhf.cli.flags import parse_config
from rrhf.cli.terminal import print_once
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.evaluation.evaluate import EvaluateConfig, evaluate
    from rrhf.report.compare import compare_rows

    result = evaluate(parse_config(EvaluateConfig, argv, "rrhf evaluate"))
    print_once(compare_rows(result.rows).text)
    print_once("rows: " + "  ".join(map(str, result.files)))
    return EXIT_DONE
