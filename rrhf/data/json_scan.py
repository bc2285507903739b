"""JSON as a stream: rows with the place they came from, however large or broken the file is.

Reads `.jsonl` and `.json`, plain or gzip, JSON lines or one JSON array, and holds one row and one
chunk in memory at a time. Lines end at b"\\n" alone (a U+2028 inside a text is text), a leading
byte-order mark and carriage returns are accepted. What cannot be read becomes a `Fault` with its
line, so that a reader can tell all of them at once instead of one a run.

Left out on purpose: writing (`rrhf.data.jsonl`), and what a row must hold
(`rrhf.data.candidate_rows`, `rrhf.data.layouts`).
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from json.decoder import JSONDecoder
from typing import Any, BinaryIO, cast

from rrhf.errors import UserError
from rrhf.files import PathLike

MAX_FAULTS = 20
MAX_ROW_BYTES = 256 << 20
READ_BYTES = 1 << 18

_BOM = codecs.BOM_UTF8
_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP_MAGIC = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")
_MEND_ROW = "mend the line, or remove it"


@dataclass(frozen=True)
class Row:
    """One JSON value of a file.

    Attributes:
        line: the line it begins on, from 1.
        offset: the byte it begins at, in the decompressed file.
        length: its bytes.
        value: what it says.
    """

    line: int
    offset: int
    length: int
    value: Any


@dataclass(frozen=True)
class Fault:
    """A place that cannot be read, and why, with the mend."""

    line: int
    reason: str


class Faults:
    """Collects what is wrong with an input, so that one `UserError` tells all of it, up to 20."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._more = False

    def add(self, text: str) -> None:
        """Add one fault: `file:line: field: what is wrong, how to mend`."""
        if len(self._lines) < MAX_FAULTS:
            self._lines.append(text)
        else:
            self._more = True

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def is_full(self) -> bool:
        """True when 20 are told and there is more: reading on adds nothing."""
        return self._more

    def raise_if_any(self) -> None:
        if self._lines:
            tail = [f"(and more: the first {MAX_FAULTS} are shown)"] if self._more else []
            raise UserError("\n".join(self._lines + tail))


def open_bytes(path: PathLike) -> BinaryIO:
    """A file's bytes, decompressed where the file is gzip (told by its first bytes, not its name).

    Raises:
        UserError: there is no such file, or it may not be read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; name a .json or .jsonl file in it") from error
    except PermissionError as error:
        raise UserError(f"{path}: may not be read; check its permissions") from error
    if file.peek(2)[:2] == _GZIP_MAGIC:
        return cast(BinaryIO, io.BufferedReader(cast(Any, _Gunzip(file))))
    return file


class _Gunzip(gzip.GzipFile):
    """A gzip reader that closes the file below it too."""

    def __init__(self, below: BinaryIO) -> None:
        super().__init__(fileobj=below, mode="rb")
        self._below = below

    def close(self) -> None:
        super().close()
        self._below.close()


def scan_rows(path: PathLike) -> Iterator[Row | Fault]:
    """Every row and every fault of a JSON Lines file or JSON array, in order, in constant memory.

    A faulty line does not end a file of lines; a fault in an array, a cut gzip or a text that is
    not UTF-8 at all does, because nothing behind it can be trusted.

    Raises:
        UserError: there is no such file.
    """
    with open_bytes(path) as file:
        try:
            start = file.read(3)
            while len(start) < 3 and (more := file.read(3 - len(start))):
                start += more
            if start[:2] in _WIDE_BOMS:
                yield Fault(1, "the file is UTF-16; write it as UTF-8")
                return
            skipped = len(_BOM) if start == _BOM else 0
            whole = _Prefixed(start[skipped:], file)
            lead = whole.peek_past_space()
        except (EOFError, OSError, zlib.error) as error:
            yield _broken_bytes(1, error)
            return
        if lead == b"[":
            yield from _scan_array(whole, skipped)
        else:
            yield from _scan_lines(whole, skipped)


class _Prefixed:
    """A binary file with some bytes put back in front of it."""

    def __init__(self, prefix: bytes, file: BinaryIO) -> None:
        self._prefix = prefix
        self._file = file

    def peek_past_space(self) -> bytes:
        """The first byte that is not white space, left in place; empty at the end of the file.

        White space of any length is legal in front; what is read to see past it is kept.
        """
        while not (stripped := self._prefix.lstrip(b" \t\r\n")):
            more = self._file.read(READ_BYTES)
            if not more or len(self._prefix) > MAX_ROW_BYTES:
                return b""
            self._prefix += more
        return stripped[:1]

    def read(self, size: int) -> bytes:
        if self._prefix:
            taken, self._prefix = self._prefix[:size], self._prefix[size:]
            return taken
        return self._file.read(size)

    def readline(self, limit: int) -> bytes:
        if self._prefix:
            newline = self._prefix.find(b"\n")
            if 0 <= newline < limit:
                taken, self._prefix = self._prefix[: newline + 1], self._prefix[newline + 1 :]
                return taken
            taken, self._prefix = self._prefix[:limit], self._prefix[limit:]
            return taken + self._file.readline(limit - len(taken)) if len(taken) < limit else taken
        return self._file.readline(limit)


def _broken_bytes(line: int, error: Exception) -> Fault:
    if isinstance(error, EOFError):
        return Fault(line, "the gzip file is cut off here; copy or make it again")
    return Fault(line, f"cannot be read on ({error}); copy or make the file again")


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return (
        f"byte {offset + error.start} of the file is not UTF-8 "
        f"(0x{error.object[error.start]:02x}); write the file as UTF-8"
    )


def _scan_lines(file: _Prefixed, offset: int) -> Iterator[Row | Fault]:
    line = 0
    while True:
        line += 1
        try:
            data = file.readline(MAX_ROW_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:
            yield _broken_bytes(line, error)
            return
        if not data:
            return
        if len(data) > MAX_ROW_BYTES:
            yield Fault(line, f"the line is longer than {MAX_ROW_BYTES:,} bytes; {_MEND_ROW}")
            return
        if data.strip():
            yield _parse_line(data, line, offset)
        offset += len(data)


def _parse_line(data: bytes, line: int, offset: int) -> Row | Fault:
    try:
        return Row(line, offset, len(data), json.loads(data.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Fault(line, _not_utf8(error, offset))
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated"):
            return Fault(
                line,
                "the line ends before its JSON does (one row must stand on one line; a cut file "
                "must be made again, or its last line removed)",
            )
        return Fault(line, f"is not JSON at column {error.pos + 1}: {error.msg}; {_MEND_ROW}")
    except (ValueError, RecursionError) as error:
        return Fault(line, f"is not JSON that can be read ({error}); {_MEND_ROW}")


class _ArrayText:
    """The text of a JSON array: a window that moves on, knowing its line and its byte."""

    def __init__(self, file: _Prefixed, offset: int) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._read_bytes = READ_BYTES
        self.text = ""
        self.position = 0
        self.line = 1
        self.offset = offset
        self.is_over = False

    def skip_to(self, position: int) -> int:
        """Move on to a position of the window; returns the bytes moved over."""
        passed = self.text[self.position : position]
        size = len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogatepass"))
        self.line += passed.count("\n")
        self.offset += size
        self.position = position
        return size

    def more(self) -> bool:
        """Read on, twice as much each time one row asks again; False at the end of the file."""
        if self.is_over:
            return False
        data = self._file.read(self._read_bytes)
        self._read_bytes = min(2 * self._read_bytes, 64 << 20)
        self.is_over = not data
        self.text = self.text[self.position :] + self._decode(data, final=self.is_over)
        self.position = 0
        return not self.is_over

    def row_done(self) -> None:
        self._read_bytes = READ_BYTES

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.position)
            assert match is not None, "the pattern matches the empty text"
            self.skip_to(match.end())
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""


def _scan_array(file: _Prefixed, offset: int) -> Iterator[Row | Fault]:
    window = _ArrayText(file, offset)
    try:
        opening = window.peek()
        assert opening == "[", f"an array begins with a bracket, not {opening!r}"
        window.skip_to(window.position + 1)
        while True:
            mark = window.peek()
            if mark == "]":
                break
            row = _next_element(window)
            yield row
            if isinstance(row, Fault):
                return
            mark = window.peek()
            if mark == ",":
                window.skip_to(window.position + 1)
                if window.peek() != "]":
                    continue
                yield Fault(window.line, "a comma stands before the closing ]; remove it")
                return
            if mark != "]":
                yield _array_fault(window, mark)
                return
        window.skip_to(window.position + 1)
        if window.peek():
            yield Fault(
                window.line,
                "something follows the closing ] of the array; a file is one array, or one JSON "
                "object a line",
            )
    except UnicodeDecodeError as error:
        yield Fault(window.line, _not_utf8(error, window.offset))
    except (EOFError, OSError, zlib.error) as error:
        yield _broken_bytes(window.line, error)


def _array_fault(window: _ArrayText, mark: str) -> Fault:
    if mark:
        return Fault(window.line, f"a comma or ] is missing before {mark!r}; put it there")
    return Fault(window.line, "the array is cut off here; make or copy the file again")


_decoder = JSONDecoder()
_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_LONGEST_ESCAPE = len(r"\ud83d\ude00")
_CUT_ESCAPE = re.compile(r"\\?u?[0-9a-fA-F]{0,4}")
_NUMBER_MAY_GO_ON = re.compile(r"[-+.eE0-9]*")


def _is_cut_word(rest: str) -> bool:
    """True where what is left may be the beginning of something that JSON knows."""
    word = rest.rstrip()
    return any(literal.startswith(word) for literal in _LITERALS) or bool(
        _CUT_ESCAPE.fullmatch(word)
    )


def _next_element(window: _ArrayText) -> Row | Fault:
    """The element that begins at the window's position."""
    while True:
        try:
            value, end = _decoder.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            margin = len(window.text) - _LONGEST_ESCAPE
            is_cut = error.msg.startswith("Unterminated") or error.pos >= margin
            if is_cut and len(window.text) - window.position > MAX_ROW_BYTES:
                reason = f"the row is longer than {MAX_ROW_BYTES:,} bytes; {_MEND_ROW}"
                return Fault(window.line, reason)
            if is_cut and window.more():
                continue
            if error.msg.startswith("Unterminated") or _is_cut_word(window.text[error.pos :]):
                return _array_fault(window, "")
            line = window.line + window.text.count("\n", window.position, error.pos)
            return Fault(line, f"is not JSON: {error.msg}; mend the row, or remove it")
        except (ValueError, RecursionError) as error:
            return Fault(window.line, f"is not JSON that can be read ({error}); {_MEND_ROW}")
        if _NUMBER_MAY_GO_ON.fullmatch(window.text, end) and window.more():
            continue
        window.row_done()
        line, offset = window.line, window.offset
        return Row(line, offset, window.skip_to(end), value)
