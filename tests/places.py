"""Where the repository, its tests and their folders are."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
FOLDERS = [TESTS, *sorted({path.parent for path in TESTS.rglob("test_*.py")} - {TESTS})]
"""Each can be imported from, as pytest has it: the names of test files occur once."""
