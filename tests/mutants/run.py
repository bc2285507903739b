"""Run planted faults in a copy of the repository, and write down which of them a test found."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from .apply import ROOT, Mutant, path_of
from .nursery import Nursery

FOUND, SURVIVED, HUNG, INVALID = "found", "survived", "found (hung)", "invalid"
ALL_GREEN, SOME_RED, STOPPED = 0, 1, 2  # pytest's own; 2 is also a file that cannot be imported


@dataclass(frozen=True)
class Outcome:
    """What became of one fault.

    Attributes:
        name, file: of the entry.
        fingerprint: of the entry.
        verdict: found, survived, found (hung) or invalid (no test ran).
        by: the first test that failed, or the end of what pytest said.
        seconds: of the tests.
        equivalent: why it may survive.
    """

    name: str
    file: str
    fingerprint: str
    verdict: str
    by: str
    seconds: float
    equivalent: str = ""

    @property
    def is_found(self) -> bool:
        return self.verdict in (FOUND, HUNG)


@contextmanager
def copied_repository(root: Path = ROOT) -> Iterator[Path]:
    """What git knows or would take of the working tree, in a temporary folder."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        copy = Path(temporary) / "repository"
        for name in filter(None, listed.decode().split("\0")):
            if (root / name).is_file():  # not one that is deleted and still in the index
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, copy / name)
        yield copy


@contextmanager
def planted(mutant: Mutant, copy: Path) -> Iterator[None]:
    """The copy with the fault in it, and afterwards without."""
    path = copy / mutant.file
    sound = path.read_text(encoding="utf-8")
    try:
        _write_module(path, mutant.applied_to(sound))
        yield
    finally:
        _write_module(path, sound)


def _write_module(path: Path, text: str) -> None:
    """Compiled code is told from its source by size and second, which a fault may both keep."""
    path.write_text(text, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def run_tests(
    nursery: Nursery, copy: Path, tests: Sequence[str], timeout_seconds: float
) -> tuple[str, str, float]:
    """Verdict, reason and seconds of some tests of the copy, up to the first that fails."""
    words = [name if ".py" not in name else path_of(name, copy) for name in tests]
    options = ["-x", "-q", "-n0", "--no-header", "--tb=line", "-rfE", "-p", "no:cacheprovider"]
    before = time.monotonic()
    code, said = nursery.pytest(copy, [*options, *words], timeout_seconds)
    seconds = time.monotonic() - before
    if code is None:
        return HUNG, f"no answer in {timeout_seconds:.0f} s", seconds
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    red = next((line for line in lines if line.startswith(("FAILED ", "ERROR "))), "")
    if code == ALL_GREEN:
        return SURVIVED, "", seconds
    if code in (SOME_RED, STOPPED) and red:
        return FOUND, red.removeprefix("FAILED ").removeprefix("ERROR ")[:160], seconds
    return INVALID, " ".join(lines[-3:])[:300], seconds


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """By name; empty where nothing has been written."""
    if not path.exists():
        return {}
    return {row["name"]: Outcome(**row) for row in json.loads(path.read_text(encoding="utf-8"))}


def write_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """As JSON, and as a table in Markdown next to it."""
    rows = list(outcomes)
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in (
        (path, json.dumps([asdict(row) for row in rows], indent=1) + "\n"),
        (path.with_suffix(".md"), table_of(rows)),
    ):
        staged = target.with_name(f".{target.name}.staged")
        staged.write_text(text, encoding="utf-8")
        os.replace(staged, target)


def table_of(outcomes: Sequence[Outcome]) -> str:
    """Counts by file, then every fault that no test found, then the others."""
    lines = ["| file | found | survived, argued | survived |", "| --- | --- | --- | --- |"]
    for file in [*sorted({one.file for one in outcomes}), ""]:
        of_file = [one for one in outcomes if file in ("", one.file)]
        left = [one for one in of_file if not one.is_found]
        argued = sum(bool(one.equivalent) for one in left)
        found = len(of_file) - len(left)
        lines.append(f"| {file or 'all'} | {found} | {argued} | {len(left) - argued} |")
    lines += ["", "| fault | verdict | by, or why no test can |", "| --- | --- | --- |"]
    for one in sorted(outcomes, key=lambda one: (one.is_found, one.file, one.name)):
        why = one.by if one.is_found else one.equivalent or one.by
        lines.append(f"| {Path(one.file).stem}: {one.name} | {one.verdict} | {_cell(why)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
