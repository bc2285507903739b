"""`python -m benchmarks NAME [--case CASE|all] [--rounds N] [--output DIR]`

NAME is a benchmark; or `all`, for every figure of the table in one go; or `gpu`, the programme of
checks and measurements for one GPU; or `table`, which writes the tables of the README from the
results.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import harness, registry, tables
from benchmarks.everything import in_fresh_processes, one_case
from benchmarks.gpu import book, programme

README = Path(__file__).with_name("README.md")


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0; 1 where a benchmark failed; 2 where what is asked for has no place here."""
    arguments = sys.argv[1:] if arguments is None else arguments
    front = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = [*registry.NAMES, "all", "gpu", "table"]
    front.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    name = front.parse_args(arguments[:1]).name
    if name == "gpu":
        return programme.main(arguments[1:])
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}")
    if name == "table":
        parser.add_argument("--results", type=Path, default=README.with_name("results"))
        parser.add_argument("--readme", type=Path, default=README)
        asked = parser.parse_args(arguments[1:])
        results = {**harness.read_all(asked.results), **book.results(asked.results / "gpu")}
        tables.write(asked.readme, results)
        return 0
    parser.add_argument("--rounds", type=int, help="in which each variant runs once")
    parser.add_argument("--output", type=Path, help="folder for the results as JSON")
    asked_for = registry.NAMES if name == "all" else (name,)
    modules = {name: registry.load(name) for name in asked_for}
    settings = {
        k: v for module in modules.values() for k, v in registry.settings_of(module).items()
    }
    for option, meaning in settings.items():
        parser.add_argument(f"--{option}", help=meaning)
    if name == "all":
        parser.add_argument(
            "--resume", action="store_true", help="keep what --output has from this very code"
        )
        asked = parser.parse_args(arguments[1:])
        given = {k: getattr(asked, k) for k in settings if getattr(asked, k) is not None}
        return in_fresh_processes(modules, asked.rounds, asked.output, given, asked.resume)
    module = modules[name]
    parser.add_argument("--case", choices=[*module.CASES, "all"], default=next(iter(module.CASES)))
    if hasattr(module, "VARIANTS"):
        parser.add_argument("--variants", nargs="+", choices=list(module.VARIANTS))
    asked = parser.parse_args(arguments[1:])
    given = {k: getattr(asked, k) for k in settings if getattr(asked, k) is not None}
    if asked.case == "all":
        return in_fresh_processes(modules, asked.rounds, asked.output, given)
    if getattr(asked, "variants", None):
        given["variants"] = asked.variants
    return one_case(name, module, asked.case, asked.rounds, asked.output, given)


if __name__ == "__main__":
    sys.exit(main())
