"""When a server may be asked next: rate limits, and waiting after failures.

Times are seconds of a monotonic clock, passed in by the caller.
"""

from __future__ import annotations

import random
import time
from collections import deque
from email.utils import parsedate_to_datetime

MAX_WAIT_SECONDS = 60.0
"""The longest wait that this client chooses itself."""
MAX_RETRY_AFTER_SECONDS = 900.0
"""A server that asks for a longer wait ends the run."""


def retry_after_seconds(header: str | None, now: float | None = None) -> float | None:
    """Return the wait that a Retry-After header asks for; None if there is no valid header.

    Args:
        header: seconds, or a date as in HTTP (RFC 9110, section 10.2.3).
        now: seconds since the epoch; None = the current time.
    """
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp()
        except ValueError:
            return None
        seconds -= time.time() if now is None else now
    return max(0.0, seconds) if seconds == seconds else None


def backoff_seconds(first: float, failures: int) -> float:
    """Return a random wait between half of `first` * 2 ** (failures - 1) and all of it, at most a
    minute."""
    most = min(MAX_WAIT_SECONDS, first * 2 ** min(failures - 1, 30))
    return most * (0.5 + random.random() / 2)


class Rate:
    """Keeps the amount of a minute within a limit.

    Args:
        limit: the most in any `window`; 0 = no limit.
        window: seconds.
    """

    def __init__(self, limit: int, window: float = 60.0) -> None:
        self._limit, self._window = limit, window
        self._used: deque[tuple[float, int]] = deque()
        self._sum = 0

    def wait(self, amount: int, now: float) -> float:
        """Return the seconds until `amount` more is allowed; an amount above the limit waits for an
        empty window."""
        if not self._limit:
            return 0.0
        while self._used and self._used[0][0] <= now - self._window:
            self._sum -= self._used.popleft()[1]
        left, until = self._sum, now
        for at, used in self._used:
            if left + amount <= self._limit:
                break
            left, until = left - used, at + self._window
        return until - now

    def take(self, amount: int, now: float) -> None:
        """Count an amount."""
        if self._limit:
            self._used.append((now, amount))
            self._sum += amount


class Pauses:
    """When a server that failed may be asked again.

    Args:
        first_seconds: the wait after the first failure; doubled after each further one.
    """

    def __init__(self, first_seconds: float) -> None:
        self._first, self._failures, self._until = first_seconds, 0, 0.0

    def wait(self, now: float) -> float:
        """Return the seconds until the server may be asked."""
        return max(0.0, self._until - now)

    def failed(self, now: float, seconds: float | None = None) -> None:
        """Note a failure; requests that were sent before the last wait began count as one failure.

        Args:
            now: the current time.
            seconds: the wait that the server asks for; None = as long as this client chooses.
        """
        if seconds is not None:
            self._until = max(self._until, now + seconds)
        elif now >= self._until:
            self._failures += 1
            self._until = now + backoff_seconds(self._first, self._failures)

    def answered(self) -> None:
        """Note that the server answered, so that the next wait is short again."""
        self._failures = 0
