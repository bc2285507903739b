"""What a process does when the one that it waits for is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from rrhf.errors import UserError
from rrhf.generation import staged_file
from rrhf.generation.staged_file import StagedFile
from rrhf.signals import StopRequest

SETTINGS = {"model": "m"}


@pytest.fixture
def second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StagedFile:
    """Process 1 of a file that process 0 has begun; an hour lasts half a second."""
    monkeypatch.setattr(staged_file, "STALLED_SECONDS", 0.5)
    monkeypatch.setattr(staged_file, "POLL_SECONDS", 0.01)
    output = tmp_path / "out.jsonl"
    StagedFile(output, "generate", 0, StopRequest()).begin(SETTINGS, {})
    return StagedFile(output, "generate", 1, StopRequest())


def test_a_process_gives_up_when_the_first_one_is_lost(second: StagedFile) -> None:
    with pytest.raises(UserError, match="process 0 has not ended it"):
        second.wait_for_end(SETTINGS)


def test_a_process_waits_as_long_as_another_one_writes(second: StagedFile) -> None:
    began = time.monotonic()

    def write() -> None:
        for _ in range(10):
            with open(second.parts.path_of(0), "ab") as part:
                part.write(b"{}\n")
            time.sleep(0.1)

    writer = threading.Thread(target=write)
    writer.start()
    with pytest.raises(UserError, match="no process has written"):
        second.wait_for_end(SETTINGS)
    writer.join()
    assert time.monotonic() - began > 1.0
