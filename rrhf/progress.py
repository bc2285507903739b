"""Shows the progress of long work: a bar on a terminal, otherwise a line every few seconds.

Lines are messages of the logger `rrhf.progress`. The command line sends them to stderr, from the
main rank only. Code that uses the package as a library sees neither bar nor line unless it sets
that logger to level INFO.

Nested work is kept on a stack. Code inside a single item, such as the loop over the tokens of a
long batch of responses, calls `pulse`, which repeats the line of the innermost work with its
current state. Standard library only; tqdm is imported when a bar is drawn.

Not thread-safe: call everything here from the thread that does the work.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

LINE_SECONDS = 5.0
"""Seconds between two lines."""

T = TypeVar("T")
_active: list[Progress] = []
# Time of the last line of any work; before the first line, the time when the first work began.
_last_line: float | None = None


class Progress:
    """Context manager: show the progress of work with a known number of items.

    Args:
        what: the work, such as "train" or "score".
        total: number of items; may be changed during the work.
        unit: name of an item, in the singular; its plural must end in s.
        done: number of items that are already done.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._done = self._done_before = done
        self._figures = ""
        self._started = _now()
        _last_line_time(self._started)
        self._bar: Any = None
        if logger.isEnabledFor(logging.INFO) and _can_draw():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, leave=not _active)

    def advance(self, count: int = 1, figures: str = "") -> None:
        """Report that `count` more items are done, with `figures` as text to show after them."""
        self._done += count
        self._figures = figures
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(count)
        else:
            self._tell("")

    def _tell(self, detail: str) -> None:
        """Write the line, unless one was written in the last `LINE_SECONDS`."""
        global _last_line
        if (now := _now()) - _last_line_time(now) < LINE_SECONDS:
            return
        _last_line = now
        logger.info("%s", self._line(now, detail))

    def _line(self, now: float, detail: str) -> str:
        parts = [f"{self.what}: {self._done} of {self.total} {self.unit}s"]
        parts += [part for part in (self._figures, detail) if part]
        done, seconds = self._done - self._done_before, now - self._started
        if done and seconds > 0:
            parts.append(_rate(done / seconds, self.unit))
            if self.total > self._done:
                parts.append(f"{duration((self.total - self._done) * seconds / done)} left")
        return ", ".join(parts)

    def __enter__(self) -> Progress:
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)
        if self._bar is not None:
            self._bar.close()


def _last_line_time(now: float) -> float:
    """Return the time of the last line, whichever work wrote it: many short pieces of work then
    share a line instead of printing one line each."""
    global _last_line
    if _last_line is None:
        _last_line = now
    return _last_line


def pulse(detail: str) -> None:
    """Report the state within an item of the innermost work; cheap enough to call per token."""
    if _active and _active[-1]._bar is None:
        _active[-1]._tell(detail)


def tracked(items: Sequence[T], what: str, unit: str) -> Iterator[T]:
    """Yield the items one by one, with progress."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.advance()


def figures(values: Mapping[str, float], forms: Mapping[str, str]) -> str:
    """Format the values that `forms` names as one text, in the order of `forms`.

    Args:
        values: name -> value.
        forms: name -> format, such as "loss {:.4g}"; names without a value are left out.
    """
    said = [form.format(values[name]) for name, form in forms.items() if name in values]
    return without_negative_zeros(", ".join(said))


def without_negative_zeros(text: str) -> str:
    """Replace negative zeros such as "-0.00" in a text by "0.00"."""
    return re.sub(r"-(0\.0*)(?![\d.e])", r"\1", text)


def duration(seconds: float) -> str:
    """Format seconds as readable text: "8 s", "1 min 22 s", "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _can_draw() -> bool:
    """Whether to draw a bar: stderr is a terminal, and its size, if known, is above one by one."""
    if not sys.stderr.isatty():
        return False
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return True
    return size.columns > 1 and size.lines > 1


def _rate(per_second: float, unit: str) -> str:
    if per_second >= 1000:
        return f"{per_second:,.0f} {unit}s/s"
    if per_second >= 1:
        return f"{per_second:.3g} {unit}s/s"
    return f"{1 / per_second:.3g} s a {unit}"


def _now() -> float:
    return time.monotonic()
