"""Read tables with a header line (CSV, TSV), and texts with one prompt per line.

All cells are text here; `rrhf.data.cells` parses lists and numbers in them. What cannot be read
becomes a `Fault` with its line.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

from rrhf.data.cells import TextCells
from rrhf.data.columns import KNOWN
from rrhf.data.compressed_files import UNREADABLE, broken_bytes, open_bytes
from rrhf.data.faults import Fault
from rrhf.errors import UserError

logger = logging.getLogger(__name__)

SEPARATORS = {".csv": ",", ".tsv": "\t"}
OTHERS = (";", "\t", "|", ",")
TEXT_SUFFIX = ".txt"
PROMPT_COLUMN = "prompt"

_MAX_CELL_CHARACTERS = 1 << 26
# The line before the names of the columns in which Excel states the separator.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')


def kind_of_file(path: str) -> str | None:
    """Return the suffix, without .gz, of a table or a text; None for any other file."""
    name = path.lower().removesuffix(".gz")
    suffixes = (*SEPARATORS, TEXT_SUFFIX)
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def table_rows(path: str, separator: str) -> Iterator[tuple[int, TextCells | Fault]]:
    """Yield the rows of a table under the names in its first line, each with its line number.

    Args:
        path: the file.
        separator: the usual separator of the file's suffix. Another separator is used if the first
            line states it (`sep=;`) or the names of the columns show it.

    Raises:
        UserError: the file is not UTF-8, or a quote is not closed.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    lines = _lines(path)  # cells may hold line breaks, so the csv module must find the rows
    names: list[str] | None = None
    line = 1
    try:
        separator, header = _read_header(path, lines, separator)
        reader = csv.reader(itertools.chain(header, lines), delimiter=separator, strict=True)
        for cells in reader:
            place, line = line, reader.line_num + 1
            if not cells:
                continue
            if names is None:
                # pandas leaves its index without a name.
                names = [name.strip() or f"column {i}" for i, name in enumerate(cells, 1)]
                if len(set(names)) < len(names):
                    raise UserError(
                        f"{path}:{place}: two columns have the same name: {names}; rename one"
                    )
            elif len(cells) == len(names):
                yield place, TextCells(zip(names, cells, strict=True))
            else:
                fault = (
                    f"has {len(cells)} cells, but the first line names {len(names)} columns; put "
                    "a cell that holds the separator, a quote or a line break in quotes, with "
                    '"" for each quote in it'
                )
                yield place, Fault(place, fault)
    except csv.Error as error:
        raise UserError(
            f'{path}:{reader.line_num}: {error}; a cell that begins with a quote (") must '
            'end with a quote, and have "" for each quote in it'
        ) from error
    except UNREADABLE as error:
        yield line, broken_bytes(line, error)


def _read_header(path: str, lines: Iterator[str], separator: str) -> tuple[str, list[str]]:
    """Find the separator of a table; also return its lines up to the line with the names."""
    header = [""]
    stated = ""
    for text in lines:
        if line_of_its_own := _SEPARATOR_LINE.fullmatch(text):
            stated, text = line_of_its_own[1], "\n"
        header.append(text)
        if text.strip():
            break
    found = stated or _separator_of(header[-1], separator)
    if found != separator:
        logger.info("%s: the columns are separated by %r", path, found)
    return found, header[1:]


def text_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | Fault | None]]:
    """Yield the prompts of a text file, one per line; None for a blank line.

    Raises:
        UserError: the file is not UTF-8.
    """
    number = 0
    try:
        for number, line in enumerate(_lines(path), start=1):
            text = line.rstrip("\r\n")
            yield number, {PROMPT_COLUMN: text} if text.strip() else None
    except UNREADABLE as error:
        yield number + 1, broken_bytes(number + 1, error)


def looks_like_json(path: str) -> bool:
    """Whether a file with the suffix of a text holds JSON: the first line is an object, or begins
    an array."""
    try:
        with open_bytes(path) as binary:
            first = binary.readline(1 << 22).removeprefix(b"\xef\xbb\xbf").strip()
            while not first and (line := binary.readline(1 << 22)):
                first = line.strip()
            if first.startswith(b"["):
                rows = json.loads(first + binary.read())
                return bool(rows) and all(isinstance(row, dict) for row in rows)
            return first.startswith(b"{") and isinstance(json.loads(first), dict)
    except (*UNREADABLE, ValueError, RecursionError):
        return False


def _lines(path: str) -> Iterator[str]:
    """Yield the lines of a text file, with their line ends.

    Raises:
        UserError: the file is not UTF-8.
    """
    with open_bytes(path) as binary:
        try:
            yield from io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error


def _separator_of(header: str, own: str) -> str:
    """Find the separator with which a header line has the most known names; in a tie, the suffix
    decides.

    Where numbers have decimal commas, spreadsheets separate the columns of a .csv by semicolons.
    """

    def fit(separator: str) -> tuple[int, bool]:
        try:
            [cells] = csv.reader([header], delimiter=separator, strict=True)
        except (csv.Error, ValueError):
            return (0, False)
        return sum(name.strip() in KNOWN for name in cells), len(cells) > 1

    # max returns the first of equal values.
    return max((own, *(other for other in OTHERS if other != own)), key=fit)
