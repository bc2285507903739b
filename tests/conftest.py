"""Fixtures for every test: data that may not be there, and small files."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import pytest

from rrhf.errors import EXIT_STOPPED_BY_SIGTERM

_SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the repository; the test skips where it is absent."""
    if not _SHARED_DATA.is_dir():
        pytest.skip(f"no data for checks at {_SHARED_DATA}")
    return _SHARED_DATA


_came: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    """SIGTERM ends the tests as it ends a command; workers end with who started them.

    Tests that send SIGINT need programs that are not deaf to it: a shell starts a background job
    with SIGINT ignored, and what the job starts inherits that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _came.append(number)
        pytest.exit("SIGTERM came", returncode=EXIT_STOPPED_BY_SIGTERM)

    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGTERM, stop)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """While a module is imported, pytest takes the exception for an error of the module."""
    if _came:
        session.exitstatus = EXIT_STOPPED_BY_SIGTERM
