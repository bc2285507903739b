"""JSON Lines: encode a row as one line, and decode it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

_decoder = json.JSONDecoder()
_encoded = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


def decode_row(line: bytes) -> Any:
    """Decode one line of JSON Lines.

    Raises:
        ValueError: the line is not one JSON value in UTF-8.
    """
    text = line.decode("utf-8").strip()
    value, end = _decoder.raw_decode(text)
    if end < len(text):
        raise ValueError(f"something follows the row: {text[end : end + 20]!r}")
    return value


def decode_rows(lines: Sequence[bytes]) -> list[Any]:
    """Decode lines that held one row each when they were checked, in less than half the time.

    Raises:
        ValueError: as for `decode_row`.
    """
    try:
        values, _ = _decoder.raw_decode((b"[" + b",".join(lines) + b"]").decode("utf-8"))
    except (ValueError, RecursionError):
        values = []
    if len(values) == len(lines):
        return cast(list[Any], values)
    return list(map(decode_row, lines))


def encode_row(value: Any) -> bytes:
    """Encode a value as one line of JSON in UTF-8, newline included.

    Characters that some readers take for line ends (U+0085, U+2028, U+2029) are escaped. A row with
    half a surrogate pair, which UTF-8 cannot encode, is written in ASCII with escapes.

    Raises:
        ValueError: the value holds NaN or an infinity.
    """
    text = _encoded(value)
    if text.isascii():
        return text.encode("ascii") + b"\n"
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode("ascii") + b"\n"
    for mark in ("\u0085", "\u2028", "\u2029"):
        if mark in text:
            data = data.replace(mark.encode("utf-8"), f"\\u{ord(mark):04x}".encode("ascii"))
    return data + b"\n"
