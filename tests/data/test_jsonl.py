"""What a row looks like as a line."""

from __future__ import annotations

import json

import pytest

from rrhf.data.jsonl import decode_row, decode_rows, encode_row


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


def test_a_line_is_its_row_alone():
    assert decode_row(b'  {"a": 1}\r\n') == {"a": 1}
    with pytest.raises(ValueError, match="something follows the row: 'x'"):
        decode_row(b'{"a": 1}x\n')


def test_lines_are_decoded_together_as_one_by_one():
    lines = [b'{"a": 1}\n', "\ufeff".join(['["', '"]']).encode(), b" 3 \n"]
    assert decode_rows(lines) == [decode_row(line) for line in lines]
    assert decode_rows([]) == []


@pytest.mark.parametrize(
    "lines", [[b'{"a": [1', b"2]}"], [b"1, 2", b"3"], [b"1, 2, [3", b"4]", b"5"], [b"\xff", b"1"]]
)
def test_lines_that_are_no_longer_one_row_each_are_refused(lines):
    with pytest.raises(ValueError):
        decode_rows(lines)
