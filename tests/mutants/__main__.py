"""`python -m tests.mutants`: plant each fault of the table, and say which ones no test finds."""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from .apply import ROOT, Mutant, StaleMutantError
from .nursery import Nursery
from .run import (
    SURVIVED,
    Outcome,
    copied_repository,
    planted,
    read_outcomes,
    run_tests,
    write_outcomes,
)
from .table import MUTANTS


def main(words: list[str] | None = None) -> int:
    """Returns 0 where all that ran were found or argued, 1 otherwise, 2 for a stale table."""
    asked = _parser().parse_args(words)
    chosen = [one for one in MUTANTS if all(part in one.name for part in asked.only)]
    if asked.file:
        chosen = [one for one in chosen if asked.file in one.file]
    if asked.list:
        print(*(f"{one.file}: {one.name}" for one in chosen), sep="\n")
        return 0
    try:
        for one in MUTANTS:
            one.applied_to((ROOT / one.file).read_text(encoding="utf-8"))
        outcomes = _up_to_date(read_outcomes(asked.out))
    except (StaleMutantError, FileNotFoundError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    todo = [one for one in chosen if asked.again or one.name not in outcomes]
    if asked.survivors:
        todo = [o for o in chosen if o.name in outcomes and not outcomes[o.name].is_found]
    random.Random(0).shuffle(todo)  # so that what has run so far says something of every file
    todo = todo[: asked.at_most] if asked.at_most else todo
    with copied_repository() as copy, Nursery() as nursery:
        if asked.baseline and not _is_green(nursery, copy, todo, asked.timeout_seconds):
            return 2
        for place, one in enumerate(todo, 1):
            with planted(one, copy):
                found = run_tests(nursery, copy, one.tests, asked.timeout_seconds)
            outcome = Outcome(one.name, one.file, one.fingerprint, *found, one.equivalent)
            outcomes[one.name] = outcome
            by_table = [outcomes[m.name] for m in MUTANTS if m.name in outcomes]
            write_outcomes(asked.out, by_table)
            print(
                f"{place}/{len(todo)} {outcome.verdict}: {Path(one.file).stem}: {one.name} "
                f"({outcome.seconds:.0f} s) {outcome.by}",
                flush=True,
            )
    mine = [outcomes[one.name] for one in chosen if one.name in outcomes]
    left = [one for one in mine if not one.is_found and not one.equivalent]
    argued = sum(bool(one.equivalent) and not one.is_found for one in mine)
    print(
        f"{len(mine)} of {len(chosen)} faults have run: {len(mine) - len(left) - argued} found, "
        f"{argued} survived as argued, {len(left)} survived; the table is in "
        f"{asked.out.with_suffix('.md')}"
    )
    for one in left:
        print(f"  {one.file}: {one.name} ({one.verdict}) {one.by}")
    return 1 if left else 0


def _up_to_date(known: dict[str, Outcome]) -> dict[str, Outcome]:
    """Outcomes of entries that are as they were."""
    now = {one.name: one.fingerprint for one in MUTANTS}
    return {name: one for name, one in known.items() if now.get(name) == one.fingerprint}


def _is_green(nursery: Nursery, copy: Path, mutants: list[Mutant], timeout_seconds: float) -> bool:
    """Whether the tests pass without a fault: where they do not, they would find everything."""
    for tests in dict.fromkeys(one.tests for one in mutants):
        verdict, reason, _ = run_tests(nursery, copy, tests, timeout_seconds)
        if verdict != SURVIVED:
            print(f"mutants: red without any fault: {' '.join(tests)}: {reason}", file=sys.stderr)
            return False
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], help="names that hold all these words")
    parser.add_argument("--file", default="", help="faults in files with this in their path")
    parser.add_argument("--at_most", type=int, default=0, help="run so many and stop; 0 = all")
    parser.add_argument("--again", action="store_true", help="also what has run before")
    parser.add_argument("--survivors", action="store_true", help="only what no test has found")
    parser.add_argument("--baseline", action="store_true", help="first the tests without a fault")
    parser.add_argument("--timeout_seconds", type=float, default=240.0, help="of one fault's tests")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.json", help="outcomes")
    parser.add_argument("--list", action="store_true", help="name the faults and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
