"""What cannot be read in a file, and its line, so that all faults can be reported at once."""

from __future__ import annotations

from dataclasses import dataclass

from rrhf.errors import UserError
from rrhf.os_errors import PathLike
from rrhf.seals import warn_accepted, what_to_do

MAX_FAULTS = 20


@dataclass(frozen=True)
class Fault:
    """A place that cannot be read, with the reason and the fix."""

    line: int
    reason: str

    def place_in(self, path: PathLike) -> str:
        """Return the file and the line, with which a message begins."""
        return f"{path}:{self.line}"


@dataclass(frozen=True)
class Edited(Fault):
    """Reports that a file does not match its manifest; always the last item of the scan."""

    def place_in(self, path: PathLike) -> str:
        return f"{path}"


class Faults:
    """Collects the faults of an input, up to 20, for one `UserError`.

    Args:
        accept_edited: only warn of a file that does not match its manifest.
    """

    def __init__(self, accept_edited: bool = False) -> None:
        self._lines: list[str] = []
        self._more = False
        self._accept_edited = accept_edited

    def add_fault(self, place: str, fault: Fault) -> None:
        """Add a fault that a scan found; `place` is the result of `Fault.place_in`."""
        if not isinstance(fault, Edited):
            self.add(f"{place}: {fault.reason}")
        elif self._accept_edited:
            warn_accepted(place, fault.reason)
        else:
            self.add(f"{place}: {what_to_do(fault.reason)}")

    def add(self, text: str) -> None:
        """Add one fault: `file:line: field: what is wrong, how to fix`."""
        if len(self._lines) < MAX_FAULTS:
            self._lines.append(text)
        else:
            self._more = True

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def is_full(self) -> bool:
        """True if there are more than 20 faults, so that further faults will not be shown."""
        return self._more

    def raise_if_any(self) -> None:
        if self._lines:
            tail = [f"(and more: the first {MAX_FAULTS} are shown)"] if self._more else []
            raise UserError("\n".join(self._lines + tail))
