"""JSON files: every form gives the same rows, faults have their line, memory is bounded."""

from __future__ import annotations

import gzip
import json
import random
import re
import time
import tracemalloc
from pathlib import Path

import pytest

from rrhf.data import compressed_files, json_scan
from rrhf.data.faults import Edited, Fault, Faults
from rrhf.data.json_scan import Row, scan_rows
from rrhf.errors import UserError
from rrhf.files import file_digest

ROWS = [
    {"a": 1, "b": "é ü 漢字 😀"},
    {"a": "u\u2028v\u2029w\u0085x", "b": ["]", "}", '"', "\\", "\n"]},
    {"a": {"deep": [[], {}, [None, True, -1.5e-3]]}},
    {},
]


def values(path: Path) -> list:
    items = list(scan_rows(path))
    assert all(isinstance(item, Row) for item in items), items
    return [item.value for item in items if isinstance(item, Row)]


def only_fault(path: Path) -> Fault:
    faults = [item for item in scan_rows(path) if isinstance(item, Fault)]
    assert len(faults) == 1, faults
    return faults[0]


def as_lines(rows: list, newline: str = "\n") -> bytes:
    return newline.join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


FORMS = {
    "lines": as_lines(ROWS) + b"\n",
    "lines without the last newline": as_lines(ROWS),
    "lines with carriage returns": as_lines(ROWS, "\r\n"),
    "lines with blank ones": b"\n \n" + as_lines(ROWS, "\n\n\t\n"),
    "lines behind a byte-order mark": b"\xef\xbb\xbf" + as_lines(ROWS),
    "array": json.dumps(ROWS).encode(),
    "array over many lines": b"\n\n " + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "array behind a byte-order mark": b"\xef\xbb\xbf" + json.dumps(ROWS).encode() + b"\n",
}


def read_pieces(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Read files in pieces of this many bytes."""
    for module in (compressed_files, json_scan):
        monkeypatch.setattr(module, "READ_BYTES", size)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
def test_every_form_gives_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, packed: bool, chunk: int
):
    read_pieces(monkeypatch, chunk)
    path = tmp_path / "f.json"  # gzip is told by its bytes, not by its name
    path.write_bytes(gzip.compress(FORMS[form]) if packed else FORMS[form])
    assert values(path) == ROWS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1, 5, 1 << 18])
def test_offset_and_length_cut_the_row_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, chunk: int
):
    read_pieces(monkeypatch, chunk)
    path = tmp_path / "f.json"
    path.write_bytes(FORMS[form])
    for item in scan_rows(path):
        assert isinstance(item, Row)
        piece = FORMS[form][item.offset : item.offset + item.length]
        assert json.loads(piece) == item.value
        assert FORMS[form][: item.offset].count(b"\n") + 1 == item.line


def test_arrays_of_random_values_read_as_json_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    draw = random.Random(0)

    def value(depth: int) -> object:
        kind = draw.randrange(8 if depth else 6)
        simple = [draw.randint(-999, 999), draw.random(), None, True, "", '"\\[{é😀' * 3]
        if kind < 6:
            return simple[kind]
        if kind == 6:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        return {str(number): value(depth - 1) for number in range(draw.randrange(4))}

    path = tmp_path / "f.json"
    for case in range(150):
        rows = [value(3) for _ in range(draw.randrange(1, 6))]
        read_pieces(monkeypatch, draw.randint(1, 9))
        path.write_text(
            json.dumps(rows, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        )
        assert values(path) == rows, case


# Faults.


def test_a_faulty_line_does_not_hide_the_others(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a" 2}\n{"a": 3}\n\xff\n{"a": 5}\n{"a": ')
    items = list(scan_rows(path))
    assert [item.value["a"] for item in items if isinstance(item, Row)] == [1, 3, 5]
    told = {item.line: item.reason for item in items if isinstance(item, Fault)}
    assert sorted(told) == [2, 4, 6]
    assert "column 6" in told[2]
    assert "byte 26 of the file is not UTF-8 (0xff)" in told[4]
    assert "ends before its JSON does" in told[6]


@pytest.mark.parametrize("cut", range(2, 40))
def test_a_cut_array_is_told_wherever_it_is_cut(tmp_path: Path, cut: int):
    whole = b'[{"a": "\\u00e9\\n"}, {"b": [true, 12]}, 3.5]'
    path = tmp_path / "f.json"
    path.write_bytes(whole[:cut])
    assert "cut off here" in only_fault(path).reason


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ('[{"a": 1}\n {"a": 2}]', 2, "a comma or ] is missing before '{'"),
        ('[{"a": 1},\n]', 2, "there is a comma before the closing ]"),
        ('[{"a": 1},\n {"a": 2 x}, {"a": 3}]', 2, "is not JSON"),
        ('[{"a": 1}]\n{"a": 2}', 2, "something follows the closing ]"),
        ('[\n\n{"a": nope}]', 3, "is not JSON"),
    ],
)
def test_a_faulty_array_names_the_line(tmp_path: Path, text: str, line: int, says: str):
    path = tmp_path / "f.json"
    path.write_text(text)
    fault = only_fault(path)
    assert says in fault.reason and fault.line == line


def test_bytes_that_are_no_utf8_in_an_array(tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    assert "not UTF-8 (0xff)" in only_fault(path).reason


@pytest.mark.parametrize("array", [False, True])
def test_a_cut_gzip_is_told_behind_its_good_rows(tmp_path: Path, array: bool):
    rows = [{"n": n, "noise": random.Random(n).random()} for n in range(2000)]
    packed = gzip.compress(json.dumps(rows).encode() if array else as_lines(rows))
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(packed[: len(packed) // 2])
    items = list(scan_rows(path))
    good = [item.value for item in items if isinstance(item, Row)]
    assert good == rows[: len(good)]
    assert isinstance(items[-1], Fault) and "cut off" in items[-1].reason


def test_gzip_with_a_wrong_checksum(tmp_path: Path):
    packed = bytearray(gzip.compress(as_lines(ROWS)))
    packed[-6] ^= 1
    (tmp_path / "f.jsonl").write_bytes(packed)
    assert any(isinstance(item, Fault) for item in scan_rows(tmp_path / "f.jsonl"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        (b'{"a": ' + b"[" * 100_000, "recursion"),
        (b'{"a": ' + b"9" * 5000 + b"}", "can be read"),
        (b'{"a": "\x00"}', "is not JSON"),
    ],
)
def test_odd_files(tmp_path: Path, data: bytes, says: str):
    path = tmp_path / "f.jsonl"
    path.write_bytes(data)
    assert re.search(says, only_fault(path).reason)


def test_a_row_beyond_the_limit_is_refused_before_it_fills_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(json_scan, "MAX_ROW_BYTES", 1000)
    read_pieces(monkeypatch, 100)
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 5000 + b'"}\n')
    fault = only_fault(path)
    assert fault.line == 2 and "longer than 1,000 bytes" in fault.reason


@pytest.mark.parametrize("newline", ["", "\n"])
def test_an_array_beyond_the_limit_is_told_behind_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newline: str
):
    monkeypatch.setattr(json_scan, "MAX_ARRAY_BYTES", 1000)
    read_pieces(monkeypatch, 100)
    path = tmp_path / "f.json"
    path.write_text("[" + f",{newline}".join(['{"a": 1}'] * 1000) + "]")
    rows = [item for item in scan_rows(path) if isinstance(item, Row)]
    assert 0 < len(rows) <= 1000 / len('{"a": 1},')
    fault = only_fault(path)
    assert "longer than 1,000 bytes" in fault.reason and "JSON lines" in fault.reason
    assert fault.line == (len(rows) if newline else 1)
    path.write_text("[" + ",".join(['{"a": 1}'] * 111) + "]")  # 1,000 bytes
    assert values(path) == [{"a": 1}] * 111


def test_an_empty_file_has_no_rows(tmp_path: Path):
    for data in (b"", b"\n \r\n", b"[]", b"[ \n ]", b"\xef\xbb\xbf"):
        (tmp_path / "f.json").write_bytes(data)
        assert list(scan_rows(tmp_path / "f.json")) == []


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_path_that_is_no_file(tmp_path: Path, name: str):
    with pytest.raises(UserError, match=r"no such file|is a folder"):
        list(scan_rows(tmp_path / name))


def test_faults_are_told_together_up_to_twenty():
    faults = Faults()
    faults.raise_if_any()
    for number in range(25):
        faults.add(f"f:{number}: wrong")
    with pytest.raises(UserError) as caught:
        faults.raise_if_any()
    lines = str(caught.value).splitlines()
    assert lines[:20] == [f"f:{number}: wrong" for number in range(20)]
    assert len(lines) == 21 and "more" in lines[20]


# White space and gzip that unpacks to far too much.


@pytest.mark.parametrize("blank", [b"\n", b" ", b" \n\t\r\n"])
def test_reading_is_linear_in_white_space(tmp_path: Path, blank: bytes):
    space = blank * (1_000_000 // len(blank))
    lines = space.count(b"\n")
    path = tmp_path / "f.json"
    for data in (
        space + b'{"a": 1}\n' + space + b'{"a": 2}',
        space + b'[{"a": 1},' + space + b'{"a": 2}]' + space,
    ):
        path.write_bytes(data)
        began = time.process_time()
        rows = [item for item in scan_rows(path) if isinstance(item, Row)]
        assert time.process_time() - began < 3
        assert [row.value for row in rows] == [{"a": 1}, {"a": 2}]
        assert rows[0].line == lines + 1
        places = [json.loads(data[row.offset : row.offset + row.length]) for row in rows]
        assert places == [{"a": 1}, {"a": 2}]


def test_a_column_counts_the_blanks_before_it(tmp_path: Path):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n\n   {'a': 1}\n")
    fault = only_fault(path)
    assert fault.line == 3 and "at column 5" in fault.reason
    path.write_bytes(b"   {}\n{'a': 1}\n")
    fault = only_fault(path)
    assert fault.line == 2 and "at column 2" in fault.reason


def test_a_file_with_a_fault_is_compared_to_its_end(tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_bytes(b'[{"a": 1}, {"a": nope}' + b" " * 1_000_000 + b"]")
    as_written = file_digest(path).as_dict()
    assert [type(item) for item in scan_rows(path, as_written)] == [Row, Fault]
    path.write_bytes(path.read_bytes()[:-1] + b"}")
    assert [type(item) for item in scan_rows(path, as_written)] == [Row, Fault, Edited]


@pytest.mark.parametrize("filling", [b"\n", b" ", b'{"a": 1}\n', b"x"])
def test_a_gzip_that_unpacks_to_far_too_much_is_not_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filling: bytes
):
    monkeypatch.setattr(compressed_files, "MAX_UNPACKED_BYTES", 1 << 20)
    path = tmp_path / "f.jsonl.gz"
    start = b'{"a": "' if filling == b"x" else b""
    path.write_bytes(gzip.compress(start + filling * (4_000_000 // len(filling)), 9))
    reasons, read = [], 0
    for item in scan_rows(path):
        if isinstance(item, Fault):
            reasons.append(item.reason)
        else:
            read += item.length
    assert len(reasons) == 1 and "more than 200 times its size" in reasons[0]
    assert read < 3_000_000


def test_rows_that_are_alike_pack_well_and_are_read(tmp_path: Path):
    rows = [{"query": f"q{n}", "responses": ["the same words " * 20] * 4} for n in range(3000)]
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(gzip.compress(as_lines(rows), 9))
    assert values(path) == rows


# Memory.


@pytest.mark.parametrize("form", ["lines", "array", "array in one line", "gzip"])
def test_memory_does_not_grow_with_a_file_of_lines(tmp_path: Path, form: str):
    rows = [{"query": f"{n} " + "x" * 1000, "responses": ["y" * 500]} for n in range(8000)]
    path = tmp_path / "f.json"
    data = {
        "lines": as_lines(rows),
        "array": json.dumps(rows, indent=0).encode(),
        "array in one line": json.dumps(rows).encode(),
        "gzip": gzip.compress(as_lines(rows), 1),
    }[form]
    path.write_bytes(data)
    size = len(data)
    del rows, data
    count = 0
    tracemalloc.start()
    for _ in scan_rows(path):
        count += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    # 12 MB of file; an array is held as bytes that grow and as text.
    assert peak < (4 * size if form.startswith("array") else 3_000_000), peak
