"""The planted faults still fit the code, and the tool that runs them tells found from survived."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mutants import __main__ as tool
from mutants.apply import ROOT, Mutant, StaleMutantError, path_of
from mutants.nursery import Nursery
from mutants.run import HUNG, INVALID, copied_repository, planted, read_outcomes, run_tests
from mutants.table import MUTANTS

SOUND = "def double(number: int) -> int:\n    return number + number\n"
TESTS = """
import time
from module import double

def test_two():
    assert double(2) == 4

def test_three():
    assert double(3) == 6
"""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_fault_fits_the_code_once_and_compiles(mutant: Mutant) -> None:
    mutant.applied_to((ROOT / mutant.file).read_text(encoding="utf-8"))


def test_the_table_is_one_and_its_tests_are_there() -> None:
    assert len(MUTANTS) >= 60
    assert not [name for name, times in Counter(one.name for one in MUTANTS).items() if times > 1]
    known: dict[str, set[str]] = {}
    for mutant in MUTANTS:
        assert mutant.test_files, f"{mutant.name}: no test is to find it"
        for name in mutant.tests:
            file, _, function = name.partition("::")
            if not file.endswith(".py"):
                continue
            if file not in known:
                tree = ast.parse((ROOT / path_of(file)).read_text(encoding="utf-8"))
                known[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert not function or function.partition("[")[0] in known[file], name


def fault(old: str, new: str, name: str = "one", equivalent: str = "") -> Mutant:
    return Mutant(name, "module.py", old, new, ("test_module.py",), equivalent)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("number - number", "0", "0 times"),
        ("number", "0", "3 times"),
        ("return number", "return (number", "would not compile"),
        ("+ number\n", "+ number  # the same\n", "the same program"),
    ],
)
def test_an_entry_that_no_longer_fits_is_refused(old: str, new: str, says: str) -> None:
    with pytest.raises(StaleMutantError, match=says):
        fault(old, new).applied_to(SOUND)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "tests").mkdir()
    (tmp_path / "module.py").write_text(SOUND)
    (tmp_path / "tests" / "test_module.py").write_text(TESTS)
    (tmp_path / "ignored.txt").write_text("")
    (tmp_path / ".gitignore").write_text("ignored.txt\n")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return tmp_path


def test_faults_are_planted_in_a_copy_and_taken_out_again(repository: Path) -> None:
    with copied_repository(repository) as copy, Nursery(()) as nursery:
        assert not (copy / "ignored.txt").exists()
        for new, verdict in (("number * number", "found"), ("2 * number", "survived")):
            with planted(fault("number + number", new), copy):
                found, by, _ = run_tests(nursery, copy, ("test_module.py",), 60)
            assert found == verdict
            assert ("test_three" in by) is (verdict == "found")
            assert (copy / "module.py").read_text() == SOUND
        assert (repository / "module.py").read_text() == SOUND
        assert run_tests(nursery, copy, ("test_missing.py",), 60)[0] == INVALID
        (copy / "tests" / "test_module.py").write_text("import time\ntime.sleep(60)\n")
        verdict, _, seconds = run_tests(nursery, copy, ("test_module.py",), 1)
        assert verdict == HUNG and seconds < 30


def test_a_run_is_written_down_goes_on_and_chooses(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = [
        fault("number + number", "number * number", "squares"),
        fault("number + number", "number << 1", "shifts", "the same for whole numbers"),
        fault("def double(number: int)", "def double(number: float)", "another type"),
    ]
    ran: list[str] = []
    verdicts = {"squares": "found", "shifts": "survived", "another type": "survived"}

    def pretended(_: object, copy: Path, tests: object, timeout: float) -> tuple[str, str, float]:
        text = (copy / "module.py").read_text()
        (name,) = [m.name for m in table if m.applied_to(SOUND) == text]
        ran.append(name)
        return verdicts[name], "a test" if verdicts[name] == "found" else "", 0.5

    monkeypatch.setattr(tool, "MUTANTS", table)
    monkeypatch.setattr(tool, "ROOT", repository)
    monkeypatch.setattr(tool, "run_tests", pretended)
    monkeypatch.setattr(tool, "Nursery", lambda: Nursery(()))
    copying = tool.copied_repository
    monkeypatch.setattr(tool, "copied_repository", lambda: copying(repository))
    out = tmp_path / "out" / "mutants.json"
    assert tool.main(["--out", str(out), "--only", "squares"]) == 0
    assert ran == ["squares"]
    assert tool.main(["--out", str(out), "--at_most", "1"]) in (0, 1)
    assert len(ran) == 2
    assert tool.main(["--out", str(out)]) == 1  # one survived without an argument
    assert sorted(ran) == ["another type", "shifts", "squares"]
    said = capsys.readouterr().out
    assert "3 of 3 faults have run: 1 found, 1 survived as argued, 1 survived" in said
    assert tool.main(["--out", str(out)]) == 1 and len(ran) == 3  # nothing is run again
    verdicts["another type"] = "found"
    assert tool.main(["--out", str(out), "--survivors", "--only", "type"]) == 0 and len(ran) == 4
    assert {name: one.is_found for name, one in read_outcomes(out).items()} == {
        "squares": True,
        "shifts": False,
        "another type": True,
    }
    page = out.with_suffix(".md").read_text()
    assert "| module.py | 2 | 1 | 0 |" in page and "the same for whole numbers" in page
    assert json.loads(out.read_text())[0]["by"] == "a test"
    table[0] = fault("number - number", "0", "squares")
    assert tool.main(["--out", str(out)]) == 2
    assert "0 times instead of once" in capsys.readouterr().err


def test_tests_that_are_red_without_a_fault_stop_the_run(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "tests" / "test_module.py").write_text("def test_it():\n    assert False\n")
    monkeypatch.setattr(tool, "MUTANTS", [fault("number + number", "0")])
    monkeypatch.setattr(tool, "ROOT", repository)
    monkeypatch.setattr(tool, "Nursery", lambda: Nursery(()))
    copying = tool.copied_repository
    monkeypatch.setattr(tool, "copied_repository", lambda: copying(repository))
    out = tmp_path / "out.json"
    assert tool.main(["--out", str(out), "--baseline"]) == 2
    assert not out.exists()


def test_it_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "--list"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(MUTANTS)
