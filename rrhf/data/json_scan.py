"""JSON as a stream: rows with the place they came from, however large or broken the file is.

Reads `.jsonl` and `.json`, plain or gzip, JSON lines or one JSON array, and holds one row and one
chunk in memory at a time. Lines end at b"\\n" alone (a U+2028 inside a text is text), a leading
byte-order mark and carriage returns are accepted. What cannot be read becomes a `Fault` with its
line, so that a reader can tell all of them at once instead of one a run.

Left out on purpose: writing (`rrhf.data.jsonl`), and what a row must hold
(`rrhf.data.candidate_rows`, `rrhf.data.formats`).
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json.decoder import JSONDecoder
from typing import Any, BinaryIO, NamedTuple, cast

from rrhf.errors import UserError
from rrhf.files import Digest
from rrhf.os_errors import PathLike, special_file
from rrhf.seals import seal_difference, warn_accepted, what_to_do

MAX_FAULTS = 20
MAX_ROW_BYTES = 256 << 20
READ_BYTES = 1 << 18
# A gzip file that unpacks to more than this, and to more than so many times its size, is taken for
# one that was made to fill memory or disk: text packs to a tenth, alike rows to a hundredth.
MAX_UNPACKED_BYTES = 64 << 20
MAX_UNPACKED_RATIO = 200

_BOM = codecs.BOM_UTF8
_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP_MAGIC = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")
_FIX_ROW = "fix the line, or remove it"
UNREADABLE = (EOFError, OSError, zlib.error)
"""What reading raises where a gzip file is cut or damaged, or a disk fails."""


class Row(NamedTuple):
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
    """A place that cannot be read, and why, with the fix."""

    line: int
    reason: str

    def place_in(self, path: PathLike) -> str:
        """What a message begins with: the file and the line."""
        return f"{path}:{self.line}"


@dataclass(frozen=True)
class Edited(Fault):
    """The file as a whole is not as its manifest describes it; the last item of a file."""

    def place_in(self, path: PathLike) -> str:
        return f"{path}"


class Faults:
    """Collects what is wrong with an input, so that one `UserError` tells all of it, up to 20.

    Args:
        accept_edited: only warn of a file that is not as its manifest describes it.
    """

    def __init__(self, accept_edited: bool = False) -> None:
        self._lines: list[str] = []
        self._more = False
        self._accept_edited = accept_edited

    def add_fault(self, place: str, fault: Fault) -> None:
        """Add what a scan found at a place (`Fault.place_in`)."""
        if not isinstance(fault, Edited):
            self.add(f"{place}: {fault.reason}")
        elif self._accept_edited:
            warn_accepted(place, fault.reason)
        else:
            self.add(f"{place}: {what_to_do(fault.reason)}")

    def add(self, text: str) -> None:
        """Add one fault: `file:line: field: what is wrong, how to fix`."""
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


def open_bytes(path: PathLike, digest: Digest | None = None) -> BinaryIO:
    """A file's bytes, decompressed where the file is gzip (told by its first bytes, not its name).

    Args:
        path: the file.
        digest: is given the bytes of the file as they are read from the disk.

    Raises:
        UserError: there is no such file, it may not be read, or it is a pipe or a device.
    """
    require_plain_input(path)
    try:
        raw = _DigestedRead(path, digest)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; check the path") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder; name a .json or .jsonl file in it") from error
    except PermissionError as error:
        raise UserError(f"{path}: may not be read; check its permissions") from error
    except OSError as error:  # a link to itself, a file where a folder should be
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    file = io.BufferedReader(raw, max(READ_BYTES, io.DEFAULT_BUFFER_SIZE))
    if file.peek(2)[:2] == _GZIP_MAGIC:
        return cast(BinaryIO, io.BufferedReader(cast(Any, _Gunzip(file))))
    return file


def require_plain_input(path: PathLike) -> None:
    """Refuse to read what is no file, such as `/dev/stdin` of a pipe or the shell's `<(...)`.

    Raises:
        UserError: it is a pipe, a socket or a device.
    """
    if kind := special_file(path):
        raise UserError(
            f"{path}: is {kind}, and data are read more than once; write them to a file, and name "
            "that"
        )


class _DigestedRead(io.FileIO):
    """A file that is hashed as it is read from its beginning to its end."""

    def __init__(self, path: PathLike, digest: Digest | None) -> None:
        super().__init__(path, "rb")
        self._digest = digest

    def readinto(self, buffer: Any) -> int | None:
        size = super().readinto(buffer)
        if self._digest is not None and size:
            self._digest.update(memoryview(buffer)[:size])
        return size

    def seekable(self) -> bool:
        return self._digest is None


class _TooLarge(OSError):
    """What a gzip file unpacks to is out of proportion."""


class _Gunzip(gzip.GzipFile):
    """A gzip reader that closes the file below it too, and stops where far too much comes out."""

    def __init__(self, below: BinaryIO) -> None:
        super().__init__(fileobj=below, mode="rb")
        self._below = below
        self._unpacked = 0

    def readinto(self, buffer: Any) -> int:
        size = super().readinto(buffer)
        self._unpacked += size
        if (
            self._unpacked > MAX_UNPACKED_BYTES
            and self._unpacked > MAX_UNPACKED_RATIO * self._below.raw.tell()  # type: ignore[attr-defined]
        ):
            raise _TooLarge
        return size

    def close(self) -> None:
        super().close()
        self._below.close()


def scan_rows(
    path: PathLike, manifest: Mapping[str, Any] | None = None, digest: Digest | None = None
) -> Iterator[Row | Fault]:
    """Every row and every fault of a JSON Lines file or JSON array, in order, in constant memory.

    A faulty line does not end a file of lines; a fault in an array, a cut gzip or a text that is
    not UTF-8 at all does, because nothing behind it can be trusted.

    Args:
        path: the file.
        manifest: of the file; where it names rows, bytes or a SHA-256 that the file does not have,
            an `Edited` is the last item.
        digest: is given the bytes of the file as they are read from the disk.

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
        below = file.raw._below if isinstance(file.raw, _Gunzip) else file  # type: ignore[attr-defined]
        while below.read(READ_BYTES):  # what stands behind a fault
            pass
    difference = seal_difference(path, manifest, digest, num_rows if is_whole else None)
    if difference is not None:
        yield Edited(0, difference)


def _scan(file: BinaryIO) -> Iterator[Row | Fault]:
    try:
        start = file.read(3)
        while len(start) < 3 and (more := file.read(3 - len(start))):
            start += more
        if start[:2] in _WIDE_BOMS:
            yield Fault(1, "the file is UTF-16; write it as UTF-8")
            return
        skipped = len(_BOM) if start == _BOM else 0
        whole = _Prefixed(start[skipped:], file, skipped)
        lead = whole.skip_space()
    except UNREADABLE as error:
        yield broken_bytes(1, error)
        return
    if lead == b"[":
        yield from _scan_array(whole)
    else:
        yield from _scan_lines(whole)


class _Prefixed:
    """A binary file with some bytes put back in front of it.

    Attributes:
        line: the line that the next byte stands on, from 1.
        column: how many bytes of that line have been skipped.
        offset: the bytes before the next one.
    """

    def __init__(self, prefix: bytes, file: BinaryIO, offset: int) -> None:
        self._prefix = prefix
        self._at = 0  # of the prefix, what has been read
        self._file = file
        self.line = 1
        self.column = 0
        self.offset = offset

    def skip_space(self) -> bytes:
        """Pass over white space of any length; returns the byte behind it, empty at the end.

        `line`, `column` and `offset` are right until something is read.
        """
        while True:
            stripped = self._prefix.lstrip(b" \t\r\n")
            space = self._prefix[: len(self._prefix) - len(stripped)]
            self.line += space.count(b"\n")
            self.offset += len(space)
            newline = space.rfind(b"\n")
            self.column = len(space) - newline - 1 + (self.column if newline < 0 else 0)
            self._prefix = stripped or self._file.read(READ_BYTES)
            if stripped or not self._prefix:
                return stripped[:1]

    def read(self, size: int) -> bytes:
        if self._at < len(self._prefix):
            self._at, start = min(self._at + size, len(self._prefix)), self._at
            return self._prefix[start : self._at]
        return self._file.read(size)

    def readline(self, limit: int) -> bytes:
        if self._at == len(self._prefix):
            return self._file.readline(limit)
        start = self._at
        newline = self._prefix.find(b"\n", start, start + limit)
        self._at = newline + 1 if newline >= 0 else min(start + limit, len(self._prefix))
        taken = self._prefix[start : self._at]
        if newline >= 0 or len(taken) == limit:
            return taken
        return taken + self._file.readline(limit - len(taken))


def broken_bytes(line: int, error: Exception) -> Fault:
    """The fault of a line behind which nothing can be read."""
    if isinstance(error, EOFError):
        return Fault(line, "the gzip file is cut off here; copy or make it again")
    if isinstance(error, _TooLarge):
        return Fault(
            line,
            f"the gzip file unpacks to more than {MAX_UNPACKED_RATIO} times its size and is not "
            "read on; if it is what you meant, unpack it and name the unpacked file",
        )
    return Fault(line, f"cannot be read on ({error}); copy or make the file again")


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    return (
        f"byte {offset + error.start} of the file is not UTF-8 "
        f"(0x{error.object[error.start]:02x}); write the file as UTF-8"
    )


def _scan_lines(file: _Prefixed) -> Iterator[Row | Fault]:
    line, offset, column = file.line - 1, file.offset, file.column
    while True:
        line += 1
        try:
            data = file.readline(MAX_ROW_BYTES + 1)
        except UNREADABLE as error:
            yield broken_bytes(line, error)
            return
        if not data:
            return
        if len(data) > MAX_ROW_BYTES:
            yield Fault(line, f"the line is longer than {MAX_ROW_BYTES:,} bytes; {_FIX_ROW}")
            return
        if data.strip():
            yield _parse_line(data, line, offset, column)
        offset += len(data)
        column = 0


def _parse_line(data: bytes, line: int, offset: int, column: int) -> Row | Fault:
    try:  # the usual line, for half the time
        text = data.decode("utf-8")
        value, end = _decoder.raw_decode(text)
        if end == len(text) - 1 and text[end] == "\n":
            return Row(line, offset, len(data), value)
    except (ValueError, RecursionError):
        pass
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
        place = column + error.pos + 1
        return Fault(line, f"is not JSON at column {place}: {error.msg}; {_FIX_ROW}")
    except (ValueError, RecursionError) as error:
        return Fault(line, f"is not JSON that can be read ({error}); {_FIX_ROW}")


class _ArrayText:
    """The text of a JSON array: a window that moves on, knowing its line and its byte."""

    def __init__(self, file: _Prefixed) -> None:
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")().decode
        self._read_bytes = READ_BYTES
        self.text = ""
        self.position = 0
        self.line = file.line
        self.offset = file.offset
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


def _scan_array(file: _Prefixed) -> Iterator[Row | Fault]:
    window = _ArrayText(file)
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
    except UNREADABLE as error:
        yield broken_bytes(window.line, error)


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
                reason = f"the row is longer than {MAX_ROW_BYTES:,} bytes; {_FIX_ROW}"
                return Fault(window.line, reason)
            if is_cut and window.more():
                continue
            if error.msg.startswith("Unterminated") or _is_cut_word(window.text[error.pos :]):
                return _array_fault(window, "")
            line = window.line + window.text.count("\n", window.position, error.pos)
            return Fault(line, f"is not JSON: {error.msg}; fix the row, or remove it")
        except (ValueError, RecursionError) as error:
            return Fault(window.line, f"is not JSON that can be read ({error}); {_FIX_ROW}")
        if _NUMBER_MAY_GO_ON.fullmatch(window.text, end) and window.more():
            continue
        window.row_done()
        line, offset = window.line, window.offset
        return Row(line, offset, window.skip_to(end), value)
