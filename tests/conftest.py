"""For every test: data that may not be there, where files are written, what runs first."""

from __future__ import annotations

import gc
import os
import shutil
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


_MEMORY = Path("/dev/shm")
_LEAST_ROOM = 4 * 2**30

# By seconds. Workers take a file at a time: one that takes a minute may not be the last.
# fmt: off
_LONGEST = [
    "demo", "real_chain", "iterative", "sharded_training", "story_scripts", "coming_from", "ppo",
]
# fmt: on

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
    config.option.loadscopereorder = False  # of pytest-xdist, by the number of tests
    if {"TMPDIR", "PYTEST_DEBUG_TEMPROOT"}.isdisjoint(os.environ) and _has_room(_MEMORY):
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(_MEMORY)


def _has_room(folder: Path) -> bool:
    """Whether tests can write there; a disk takes a minute to sync and remove all their files."""
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < _LEAST_ROOM:
        return False
    return not os.statvfs(folder).f_flag & os.ST_NOEXEC  # scripts that stand in for programs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first."""
    places = {f"test_{name}.py": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def pytest_collection_finish() -> None:
    """What is imported by now stays; to look through it for garbage takes 0.2 s each time."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """While a module is imported, pytest takes the exception for an error of the module."""
    if _came:
        session.exitstatus = EXIT_STOPPED_BY_SIGTERM
