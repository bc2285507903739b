"""`rrhf evaluate`: parse, call, print; what it does stands in `rrhf.evaluation.evaluate`."""

from __future__ import annotations

from rrhf.cli.flags import parse_config
from rrhf.errors import EXIT_DONE


def main(argv: list[str]) -> int:
    from rrhf.evaluation.evaluate import EvaluateConfig, evaluate

    evaluate(parse_config(EvaluateConfig, argv, "rrhf evaluate"))
    return EXIT_DONE
