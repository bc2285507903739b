"""Files that are no JSON: tables with a header line (CSV, TSV), and texts with one prompt a line.

All cells are text, except where a column is known to hold a number, a truth value or a list: there
a cell is read as JSON. What cannot be read becomes a `Fault` with its line.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from rrhf.data.columns import (
    CONVERSATIONS,
    REPLY_LISTS,
    SCORE_LISTS,
    SCORES,
)
from rrhf.data.json_scan import UNREADABLE, Fault, broken_bytes, open_bytes
from rrhf.errors import UserError

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TEXT_SUFFIX = ".txt"
PROMPT_COLUMN = "prompt"

_MAX_CELL_CHARACTERS = 1 << 26
_NOT_TEXT = frozenset(
    {
        *(*CONVERSATIONS, *REPLY_LISTS, *SCORE_LISTS, *SCORES, "rank", "ranking"),
        *("better_response_id", "better", "label", "sources", "finish_reasons"),
    }
)


def kind_of_file(path: str) -> str | None:
    """The suffix that decides how a file is read, that of packing left out; None = not here."""
    name = path.removesuffix(".gz")
    suffixes = (*SEPARATORS, TEXT_SUFFIX)
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def table_rows(path: str, separator: str) -> Iterator[tuple[int, dict[str, Any] | Fault]]:
    """The rows of a table under its first line's names, each with its line.

    Raises:
        UserError: it is no UTF-8, or a quote is not closed.
    """
    csv.field_size_limit(_MAX_CELL_CHARACTERS)
    with open_bytes(path) as binary:
        # Cells may hold line breaks, so that lines are the csv module's to find.
        reader = csv.reader(_decoded(binary), delimiter=separator, strict=True)
        names: list[str] | None = None
        line = 1
        try:
            for cells in reader:
                place, line = line, reader.line_num + 1
                if not cells:
                    continue
                if names is None:
                    names = [name.strip() for name in cells]
                    if len(set(names)) < len(names):
                        raise UserError(f"{path}:{place}: two columns have one name: {names}")
                elif len(cells) != len(names):
                    yield (
                        place,
                        Fault(
                            place,
                            f"has {len(cells)} cells where the first line names {len(names)} "
                            "columns; put a cell that holds the separator, a quote or a line break "
                            'in quotes, with "" for each quote in it',
                        ),
                    )
                else:
                    yield place, {n: _value(n, c) for n, c in zip(names, cells, strict=True)}
        except csv.Error as error:
            raise UserError(
                f'{path}:{reader.line_num}: {error}; a cell that begins with a quote (") ends with '
                'one, and has "" for each quote in it'
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
        except UNREADABLE as error:
            yield line, broken_bytes(line, error)


def text_rows(path: str) -> Iterator[tuple[int, dict[str, Any] | Fault | None]]:
    """The prompts of a text file, one a line; None for a blank line.

    Raises:
        UserError: it is no UTF-8.
    """
    number = 0
    with open_bytes(path) as binary:
        try:
            for number, line in enumerate(_decoded(binary), start=1):
                text = line.rstrip("\r\n")
                yield number, {PROMPT_COLUMN: text} if text.strip() else None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: is not UTF-8 ({error}); save it as UTF-8") from error
        except UNREADABLE as error:
            yield number + 1, broken_bytes(number + 1, error)


def looks_like_json(path: str) -> bool:
    """Whether a file with a text's name holds JSON: a first line with an object, or an array."""
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


def _decoded(binary: Any) -> io.TextIOWrapper:
    return io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")


def _value(name: str, cell: str) -> Any:
    """A cell; where no text is expected, what JSON makes of it."""
    if name not in _NOT_TEXT:
        return cell
    if cell.strip().lower() in ("", "none", "null", "nan"):
        return None
    try:
        plain = cell.strip().lower()
        return json.loads(plain if plain in ("true", "false") else cell)
    except (ValueError, RecursionError):
        return cell
