"""One planted fault: what it replaces in which file, and when it no longer fits the code."""

from __future__ import annotations

import ast
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class StaleMutantError(ValueError):
    """The file no longer holds the old text exactly once, or the new one is no program."""


@dataclass(frozen=True)
class Mutant:
    """A single mistake.

    Attributes:
        name: says the mistake; unique.
        file: below the repository's root.
        old: occurs in it exactly once.
        new: stands there instead.
        tests: arguments of pytest; of a test file its name alone, which occurs once.
        equivalent: why no test can notice it; empty where one must.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""

    def applied_to(self, text: str) -> str:
        """The file's text with the mistake in it.

        Raises:
            StaleMutantError: the old text is not there exactly once, the result does not compile,
                or it is the same program.
        """
        if (found := text.count(self.old)) != 1:
            raise StaleMutantError(
                f"{self.name}: {self.file} holds its old text {found} times instead of once: "
                f"{self.old!r}; bring the entry up to date"
            )
        changed = text.replace(self.old, self.new)
        try:
            compile(changed, self.file, "exec")
        except SyntaxError as error:
            raise StaleMutantError(f"{self.name}: {self.file} would not compile: {error}") from None
        if _meaning(text) == _meaning(changed):
            raise StaleMutantError(f"{self.name}: the new text is the same program")
        return changed

    @property
    def fingerprint(self) -> str:
        """Of the entry: what has run before is known by it."""
        parts = (self.file, self.old, self.new, *self.tests)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    @property
    def test_files(self) -> set[str]:
        """Below the repository's root."""
        return {path_of(name).partition("::")[0] for name in self.tests if ".py" in name}


def path_of(test: str, root: Path = ROOT) -> str:
    """A test that is given by the name of its file, which occurs once, below the root."""
    found = next((root / "tests").rglob(test.partition("::")[0]), None)
    return test if found is None else f"{found.parent.relative_to(root).as_posix()}/{test}"


@functools.lru_cache(maxsize=32)
def _meaning(program: str) -> str:
    """The same for programs that differ in comments and white space alone."""
    return ast.dump(ast.parse(program))
