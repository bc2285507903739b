"""The file next to an output that keeps what servers were asked and answered until it is complete.

It has the form of a part (`rrhf.stages.part_file`): rows with checksums, appended one by one, an
incomplete last row cut off when it is opened again, one writer at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.stages.part_file import FIRST_LINE, START_AGAIN, PartAppender, decode_part_row

logger = logging.getLogger(__name__)


def journal_path(output: Path) -> Path:
    """Return the path of an output's journal: `X.answers.jsonl` for `X.jsonl`."""
    return output.with_name(
        f"{output.name.removesuffix('.jsonl').removesuffix('.json')}.answers.jsonl"
    )


class JournalFile:
    """Keeps rows in a file, which is made and locked when the first row is written.

    What another process wrote in the meantime is not known to the caller, so then no row is
    written.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._appender: PartAppender | None = None
        self._size = len(FIRST_LINE)  # when this process last held the file

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of earlier runs; a damaged row is left out with a warning.

        Raises:
            UserError: another process is writing the file, or it is not a journal.
        """
        if not self.path.exists():
            return
        with PartAppender(self.path), open(self.path, "rb") as file:
            self._size = self.path.stat().st_size
            for number, line in enumerate(file, start=1):
                row = decode_part_row(line)
                if row is not None:
                    yield row
                elif line != FIRST_LINE:
                    logger.warning("%s:%d: is damaged; the row is left out", self.path, number)

    def append(self, value: dict[str, Any]) -> None:
        """Write a row; a kill afterwards does not lose it.

        Raises:
            UserError: another process is writing the file, or has written it since `rows`.
        """
        self._hold().append(value)

    def _hold(self) -> PartAppender:
        if self._appender is None:
            appender = PartAppender(self.path)
            if self.path.stat().st_size != self._size:
                appender.remove_if_bare()
                appender.close()
                raise UserError(
                    f"{self.path}: another process has written it in the meantime; {START_AGAIN}"
                )
            self._appender = appender
        return self._appender

    def close(self) -> None:
        """Release the file; it is opened again when a row is written."""
        if self._appender is not None:
            is_there = self.path.exists()
            self._size = self.path.stat().st_size if is_there else len(FIRST_LINE)
            self._appender.close()
            self._appender = None

    def remove(self) -> None:
        """Remove the file, once what it keeps is in a finished output; another process' rows stay,
        with a warning."""
        if not self.path.exists():
            return
        try:
            self._hold()
        except UserError as error:
            logger.warning("%s; the file is left there", error)
            return
        self.path.unlink(missing_ok=True)
        self.close()
