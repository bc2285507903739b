"""What a row looks like as a line."""

from __future__ import annotations

import json

import pytest

from rrhf.data.jsonl import decode_row, encode_row


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
