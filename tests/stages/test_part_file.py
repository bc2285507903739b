"""Rows that are appended survive a kill."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rrhf.errors import UserError
from rrhf.stages import part_file
from rrhf.stages.part_file import FIRST_LINE, PartAppender, decode_part_row, encode_part_row


def numbers_in(path: Path) -> list[int]:
    first, *lines = path.read_bytes().splitlines(keepends=True)
    assert first == FIRST_LINE
    rows = [decode_part_row(line) for line in lines]
    return [row["n"] for row in rows if row is not None]


def test_appending_goes_on_where_it_ended(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    for number in range(3):
        with PartAppender(path) as appender:
            appender.append({"n": number})
            assert appender.bytes_cut == 0
    assert numbers_in(path) == [0, 1, 2]


def test_a_file_cut_at_any_byte_loses_only_the_torn_row(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    rows = {"n": 0, "t": "é漢"}, {"n": 1, "t": "\U0001f600"}
    whole = b"".join(map(encode_part_row, rows))
    first_end = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(FIRST_LINE + whole[:cut])
        with PartAppender(path) as appender:
            torn = appender.bytes_cut
            appender.append({"n": 9})
        kept = [0] * (cut >= first_end - 1) + [1] * (cut >= len(whole) - 1)
        assert numbers_in(path) == [*kept, 9], cut
        if cut not in (0, first_end - 1, first_end, len(whole) - 1, len(whole)):
            assert torn == (cut if cut < first_end else cut - first_end)


WRITER = """
import sys
from pathlib import Path
from rrhf.stages.part_file import PartAppender
appender = PartAppender(Path(sys.argv[1]))
n = 0
while True:
    appender.append({"n": n, "text": "x" * 200})
    print(n, flush=True)
    n += 1
"""


def test_sigkill_loses_no_row_that_was_handed_over(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    while writer.stdout.readline() != "50\n":
        pass
    writer.send_signal(signal.SIGKILL)
    said = [int(line) for line in writer.stdout.read().split() if line.isdigit()]
    writer.wait()
    with PartAppender(path):
        pass
    numbers = numbers_in(path)
    assert numbers == list(range(len(numbers)))
    assert numbers[-1] >= (said[-2] if len(said) > 1 else 50)  # the last word may itself be cut


def test_rows_are_synced_every_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    clock = [100.0]
    monkeypatch.setattr(part_file.os, "fsync", synced.append)
    monkeypatch.setattr(part_file.time, "monotonic", lambda: clock[0])
    with PartAppender(tmp_path / "f.jsonl") as appender:
        synced.clear()  # the new file with its first line
        for count in range(3):
            for _ in range(50):
                appender.append({})
                clock[0] += 0.015
            assert len(synced) == count
            clock[0] += 0.5
            appender.append({})
            assert len(synced) == count + 1


def test_a_full_disk_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "f.jsonl"
    write = os.write

    def half_then_full(handle: int, data: memoryview) -> int:
        if len(data) > 10:
            return write(handle, data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with PartAppender(path) as appender:
        appender.append({"n": 0})
        with monkeypatch.context() as patch:
            patch.setattr(part_file.os, "write", half_then_full)
            with pytest.raises(UserError, match=r"no space left: \d+ bytes needed"):
                appender.append({"n": 1, "text": "longer"})
        appender.append({"n": 2})
    assert numbers_in(path) == [0, 2]


def test_one_writer_at_a_time(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    with PartAppender(path):
        began = time.monotonic()
        with pytest.raises(UserError, match="another process is writing"):
            PartAppender(path)
        assert time.monotonic() - began < 60, "it waited for the writer"
    PartAppender(path).close()
