"""The file next to an output that keeps what servers were asked and answered until it is complete.

It has the form of a part (`rrhf.stages.part_file`): rows with checksums, appended one by one, an
incomplete last row cut off when it is opened again, one writer at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rrhf.stages.part_file import FIRST_LINE, PartAppender, decode_part_row

logger = logging.getLogger(__name__)


def journal_path(output: Path) -> Path:
    """Return the path of an output's journal: `X.answers.jsonl` for `X.jsonl`."""
    return output.with_name(
        f"{output.name.removesuffix('.jsonl').removesuffix('.json')}.answers.jsonl"
    )


class JournalFile:
    """Keeps rows in a file, which is made and locked when the first row is written.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._appender: PartAppender | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of earlier runs; a damaged row is left out with a warning.

        Raises:
            UserError: another process is writing the file, or it is not a journal.
        """
        if not self.path.exists():
            return
        with PartAppender(self.path), open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                row = decode_part_row(line)
                if row is not None:
                    yield row
                elif line != FIRST_LINE:
                    logger.warning("%s:%d: is damaged; the row is left out", self.path, number)

    def append(self, value: dict[str, Any]) -> None:
        """Write a row; a kill afterwards does not lose it."""
        if self._appender is None:
            self._appender = PartAppender(self.path)
        self._appender.append(value)

    def close(self) -> None:
        """Release the file; it is opened again when a row is written."""
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    def remove(self) -> None:
        """Remove the file, once what it keeps is in a finished output."""
        self.close()
        self.path.unlink(missing_ok=True)
