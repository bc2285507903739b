"""Rows that are appended survive a kill; rows that are read come in order or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rrhf.data import jsonl
from rrhf.data.jsonl import JsonlAppender, encode_row, read_rows
from rrhf.errors import UserError


def test_read_rows_gives_line_numbers(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert list(read_rows(path)) == [(1, {"a": 1}), (3, {"a": 2})]


def test_read_rows_tells_all_faults_and_yields_nothing_behind_the_first(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"a": 1}\nx\n{"a": 2}\ny\n')
    found = []
    with pytest.raises(UserError) as caught:
        for row in read_rows(path):
            found.append(row)
    assert found == [(1, {"a": 1})]
    assert [line.split(": ")[0] for line in str(caught.value).splitlines()] == [
        f"{path}:2",
        f"{path}:4",
    ]


# What a row looks like.


def test_a_row_is_one_line_for_every_reader():
    value = {"text": "a\nb\u2028c\u2029d\u0085e\r é 漢"}
    data = encode_row(value)
    assert data.endswith(b"\n") and len(data.decode().splitlines()) == 1
    assert "漢".encode() in data  # readable, where it can be
    assert json.loads(data) == value


def test_half_a_surrogate_pair_survives_as_an_escape():
    value = {"text": "é \ud83d"}
    assert json.loads(encode_row(value)) == value


def test_nan_is_refused():
    with pytest.raises(ValueError, match="Out of range"):
        encode_row({"score": float("nan")})


# Appending.


def test_appending_goes_on_where_it_ended(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    for number in range(3):
        with JsonlAppender(path) as appender:
            appender.append({"n": number})
            assert appender.bytes_cut == 0
    assert [row["n"] for _, row in read_rows(path)] == [0, 1, 2]


def test_a_file_cut_at_any_byte_loses_only_the_torn_row(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    whole = encode_row({"n": 0, "t": "é漢"}) + encode_row({"n": 1, "t": "\U0001f600"})
    first_end = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        with JsonlAppender(path) as appender:
            torn = appender.bytes_cut
            appender.append({"n": 9})
        kept = [0] * (cut >= first_end - 1) + [1] * (cut >= len(whole) - 1)
        assert [row["n"] for _, row in read_rows(path)] == [*kept, 9], cut
        if cut not in (0, first_end - 1, first_end, len(whole) - 1, len(whole)):
            assert torn == (cut if cut < first_end else cut - first_end)


WRITER = """
import sys
from rrhf.data.jsonl import JsonlAppender
appender = JsonlAppender(sys.argv[1])
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
    with JsonlAppender(path):
        pass
    numbers = [row["n"] for _, row in read_rows(path)]
    assert numbers == list(range(len(numbers)))
    assert numbers[-1] >= (said[-2] if len(said) > 1 else 50)  # the last word may itself be cut


def test_rows_are_synced_every_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    clock = [100.0]
    monkeypatch.setattr(jsonl.os, "fsync", synced.append)
    monkeypatch.setattr(jsonl.time, "monotonic", lambda: clock[0])
    with JsonlAppender(tmp_path / "f.jsonl") as appender:
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

    with JsonlAppender(path) as appender:
        appender.append({"n": 0})
        with monkeypatch.context() as patch:
            patch.setattr(jsonl.os, "write", half_then_full)
            with pytest.raises(UserError, match=r"no space left: \d+ bytes needed"):
                appender.append({"n": 1, "text": "longer"})
        appender.append({"n": 2})
    assert [row["n"] for _, row in read_rows(path)] == [0, 2]


def test_one_writer_at_a_time(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    with JsonlAppender(path):
        began = time.monotonic()
        with pytest.raises(UserError, match="another process is writing"):
            JsonlAppender(path)
        assert time.monotonic() - began < 60, "it waited for the writer"
    JsonlAppender(path).close()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("f.jsonl.gz", b"", "drop the .gz"),
        ("f.json", b' [{"a": 1}]', "one JSON array"),
    ],
)
def test_what_cannot_be_appended_to_is_left_alone(
    tmp_path: Path, name: str, content: bytes, says: str
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=says):
        JsonlAppender(path)
    assert path.read_bytes() == content
