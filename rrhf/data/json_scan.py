"""Read the rows of JSON files with their line numbers, and report what cannot be read.

JSON lines are read one row at a time; a JSON array is read whole, up to `MAX_ARRAY_BYTES`. Lines
end only at b"\\n" (a U+2028 inside a text is text); a leading byte-order mark and carriage returns
are accepted.

Left out on purpose: writing (`rrhf.data.jsonl`), and what a row must hold
(`rrhf.data.candidate_rows`, `rrhf.data.formats`).
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from json.decoder import JSONDecoder
from typing import Any, BinaryIO, NamedTuple, cast

from rrhf.data.compressed_files import (
    READ_BYTES,
    UNREADABLE,
    broken_bytes,
    open_bytes,
    packed_bytes,
)
from rrhf.data.faults import Edited, Fault
from rrhf.files import Digest, unique_keys
from rrhf.os_errors import PathLike
from rrhf.seals import seal_difference

MAX_ROW_BYTES = 256 << 20
MAX_ARRAY_BYTES = 1 << 30
"""A JSON array is read whole, into some two to five times as much memory."""

_BOM = codecs.BOM_UTF8
_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SPACE = re.compile(r"[ \t\r\n]*")
_BLANKS = b" \t\r\n"
_FIX_ROW = "fix the line, or remove it"
_CUT_ARRAY = "the array is cut off here; make or copy the file again"
_LONG_ARRAY = (
    "the array is longer than {:,} bytes, and arrays are read whole; write it as JSON lines, one "
    "row a line (jq -c '.[]' FILE), which may be of any length"
)


class Row(NamedTuple):
    """One JSON value of a file.

    Attributes:
        line: the line on which the value begins, from 1.
        offset: the byte at which the value begins, in the decompressed file.
        length: the number of bytes.
        value: the decoded value.
    """

    line: int
    offset: int
    length: int
    value: Any


def scan_rows(
    path: PathLike, manifest: Mapping[str, Any] | None = None, digest: Digest | None = None
) -> Iterator[Row | Fault]:
    """Yield every row and every fault of a JSON Lines file or JSON array, in order.

    In JSON lines, reading goes on after a faulty line. Reading ends at a fault in an array, at a
    damaged gzip file and in a UTF-16 file, because nothing after such a fault can be trusted.

    Args:
        path: the file.
        manifest: the file's manifest; if its rows, bytes or SHA-256 do not match the file, the last
            item is an `Edited`.
        digest: updated with the file's bytes as they are read from the disk, still compressed.

    Raises:
        UserError: there is no such file.
    """
    if digest is None and manifest is not None:
        digest = Digest()
    num_rows = 0
    is_whole = True
    with open_bytes(path, digest) as file:
        for item in _scan(file):
            is_row = isinstance(item, Row)
            num_rows += is_row
            is_whole = is_whole and is_row
            yield item
        if digest is None:
            return
        packed = packed_bytes(file)
        while packed.read(READ_BYTES):  # the rest of the file after a fault, for the digest
            pass
    difference = seal_difference(path, manifest, digest, num_rows if is_whole else None)
    if difference is not None:
        yield Edited(0, difference)


def _scan(file: BinaryIO) -> Iterator[Row | Fault]:
    line = offset = 0
    is_start = True  # nothing but white space so far
    try:
        start = cast(io.BufferedReader, file).peek(len(_BOM))[: len(_BOM)]
        if start[:2] in _WIDE_BOMS:
            yield Fault(1, "the file is UTF-16; write it as UTF-8")
            return
        if start == _BOM:
            offset = len(file.read(len(_BOM)))
        while data := file.readline(MAX_ROW_BYTES + 1):
            line += 1
            if is_start and (text := data.strip(_BLANKS)):
                is_start = False
                if text[:1] == b"[":
                    yield from _scan_array(data, file, line, offset)
                    return
            if len(data) > MAX_ROW_BYTES:
                yield Fault(line, f"the line is longer than {MAX_ROW_BYTES:,} bytes; {_FIX_ROW}")
                return
            if data.strip():
                yield _parse_line(data, line, offset)
            offset += len(data)
    except UNREADABLE as error:
        yield broken_bytes(line + 1, error)


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return (
        f"byte {offset + error.start} of the file is not UTF-8 "
        f"(0x{error.object[error.start]:02x}); write the file as UTF-8"
    )


def _parse_line(data: bytes, line: int, offset: int) -> Row | Fault:
    try:  # a line without faults, parsed in half the time
        text = data.decode("utf-8")
        value, end = _decoder.raw_decode(text)
        if end == len(text) - 1 and text[end] == "\n":
            return Row(line, offset, len(data), value)
    except (ValueError, RecursionError):
        pass
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique_keys)
        return Row(line, offset, len(data), value)
    except UnicodeDecodeError as error:
        return Fault(line, _not_utf8(error, offset))
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
            return Fault(
                line,
                "the line ends before its JSON does (each row must be on one line; if the file was "
                "cut off, make it again or remove its last line)",
            )
        return Fault(line, f"is not JSON at column {error.pos + 1}: {error.msg}; {_FIX_ROW}")
    except (ValueError, RecursionError) as error:
        return Fault(line, f"is not JSON that can be read ({error}); {_FIX_ROW}")


_decoder = JSONDecoder(object_pairs_hook=unique_keys)
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_CUT_ESCAPE = re.compile(r"\\?u?[0-9a-fA-F]{0,4}")


def _scan_array(start: bytes, file: BinaryIO, line: int, offset: int) -> Iterator[Row | Fault]:
    """Yield the rows and faults of an array, which is read whole.

    Args:
        start: the first line, or as much of it as was read.
        file: the file, from which the rest is read.
        line, offset: line number and byte of `start` in the file.
    """
    text, broken = _read_text(start, file, offset)
    position = 0

    def here(place: int) -> int:
        """Move on to a place in the text; return the number of bytes passed."""
        nonlocal line, offset, position
        passed = text[position:place]
        size = len(passed) if passed.isascii() else len(passed.encode("utf-8"))
        line, offset, position = line + passed.count("\n"), offset + size, place
        return size

    def mark(place: int) -> str:
        """Move on to the next character that is not white space, and return it; "" at the end."""
        found = _SPACE.match(text, place)
        assert found is not None, "the pattern matches the empty text"
        here(found.end())
        return text[position : position + 1]

    def fault(found: str) -> Fault:
        if found:
            return Fault(line, f"a comma or ] is missing before {found!r}; insert it")
        return broken(line) if broken else Fault(line, _CUT_ARRAY)

    opening = mark(0)
    assert opening == "[", f"an array begins with a bracket, not {opening!r}"
    found = mark(position + 1)
    while found != "]":
        try:
            value, end = _decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            is_cut = error.msg.startswith("Unterminated") or _is_cut_word(text[error.pos :])
            here(position if is_cut else error.pos)
            reason = f"is not JSON: {error.msg}; fix the row, or remove it"
            yield fault("") if is_cut else Fault(line, reason)
            return
        except (ValueError, RecursionError) as error:
            yield Fault(line, f"is not JSON that can be read ({error}); {_FIX_ROW}")
            return
        begin = (line, offset)
        yield Row(*begin, here(end), value)
        found = mark(end)
        if found == ",":
            found = mark(position + 1)
            if found == "]":
                yield Fault(line, "there is a comma before the closing ]; remove it")
                return
        elif found != "]":
            yield fault(found)
            return
    if mark(position + 1):
        yield Fault(
            line,
            "something follows the closing ] of the array; a file is either one array, or one JSON "
            "object per line",
        )
    elif broken:
        yield broken(line)


def _read_text(
    start: bytes, file: BinaryIO, offset: int
) -> tuple[str, Callable[[int], Fault] | None]:
    """Read the text as far as possible.

    Returns:
        The text; and, if it is cut off, a function that makes the fault, else None.
    """
    data = bytearray(start)
    broken: Callable[[int], Fault] | None = None
    try:
        while len(data) <= MAX_ARRAY_BYTES and (piece := file.read(READ_BYTES)):
            data += piece
    except UNREADABLE as error:
        broken = partial(broken_bytes, error=error)
    if len(data) > MAX_ARRAY_BYTES:
        broken = partial(Fault, reason=_LONG_ARRAY.format(MAX_ARRAY_BYTES))
        del data[MAX_ARRAY_BYTES:]
    try:
        return data.decode("utf-8"), broken
    except UnicodeDecodeError as error:
        if error.end < len(data) or broken is None:
            broken = partial(Fault, reason=_not_utf8(error, offset))
        return data[: error.start].decode("utf-8"), broken


def _is_cut_word(rest: str) -> bool:
    """Whether the rest of a text may be the beginning of a literal (such as null) or an escape."""
    word = rest.rstrip()
    return any(literal.startswith(word) for literal in _LITERALS) or bool(
        _CUT_ESCAPE.fullmatch(word)
    )
