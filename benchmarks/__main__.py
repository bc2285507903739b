"""`python -m benchmarks NAME --shape SHAPE ...`"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import harness, peak_memory, rrhf_step
from benchmarks.shapes import SHAPES

DEFAULT = ["shared_prefix"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="NAME")
    step = commands.add_parser("rrhf_step", help="a training step against the original-style one")
    step.add_argument("--rounds", type=int, default=5, help="in which each variant runs once")
    step.set_defaults(run=lambda asked, shape: rrhf_step.run(shape, asked.variants, asked.rounds))
    memory = commands.add_parser("peak_memory", help="extra memory of one training step")
    memory.set_defaults(run=lambda asked, shape: peak_memory.run(shape, asked.variants))
    for command, table in ((step, rrhf_step.table), (memory, peak_memory.table)):
        command.set_defaults(table=table)
        command.add_argument("--shape", choices=[*SHAPES, "all"], default="S1")
        command.add_argument(
            "--variants", nargs="+", choices=list(rrhf_step.VARIANTS), default=DEFAULT
        )
        command.add_argument("--output", type=Path, help="folder for the results as JSON")
    asked = parser.parse_args()
    for shape in SHAPES if asked.shape == "all" else [asked.shape]:
        result = asked.run(asked, shape)
        print(asked.table(result), flush=True)
        if asked.output:
            parts = [result["benchmark"], shape]
            parts += [] if asked.variants == DEFAULT else asked.variants
            harness.write(asked.output / ("_".join(parts) + ".json"), result)


if __name__ == "__main__":
    main()
