"""Menus for the first word after `rrhf`, `rrhf train` and `rrhf data`: the page that lists the
choices, and the error for any other word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rrhf.errors import UserError


@dataclass(frozen=True)
class Menu:
    """Words to choose from.

    Attributes:
        prog: the words before the choice, such as "rrhf train".
        kind: what is chosen, such as "stage".
        about: a sentence on what the command is for.
        entries: word -> what it does.
        notes: lines to print below the entries.
    """

    prog: str
    kind: str
    about: str
    entries: Mapping[str, str]
    notes: tuple[str, ...]

    def page(self) -> str:
        width = max(map(len, self.entries))
        lines = [f"usage: {self.prog} {self.kind.upper()} [arguments]", "", self.about, ""]
        lines += [f"{self.kind}s:"]
        lines += [f"  {name:<{width}}  {summary}" for name, summary in self.entries.items()]
        return "\n".join([*lines, *self.notes])

    def is_shown(self, argv: Sequence[str]) -> bool:
        """Print the page if the arguments ask for help; return whether they do.

        Raises:
            UserError: there are no arguments.
        """
        if not argv:
            raise UserError(f"{self.prog}: no {self.kind} given\n\n{self.page()}")
        if argv[0] not in ("-h", "--help", "help"):
            return False
        print(self.page())
        return True

    def unknown(self, word: str, more: Iterable[str] = ()) -> UserError:
        """Return the error for a word that is not an entry; the error suggests similar entries.

        Args:
            word: the word that the user typed.
            more: further accepted words, for the suggestions.
        """
        from rrhf.cli.fields import near

        close = near(word, [*self.entries, *more])
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "."
        names = ", ".join(self.entries)
        return UserError(
            f"{self.prog}: unknown {self.kind} {word!r}{hint} {self.kind.capitalize()}s: {names}."
        )
