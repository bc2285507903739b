"""Results of several processes, row by row on disk, and their merging in the order of the prompts.

While `X.jsonl` is being made, process r appends its rows to `X.rank<r>.jsonl` beside it, each with
the id of its prompt and what is counted about it. A part survives a kill at any moment; the parts
of all processes together say what is done, also when fewer or more processes go on later. Once they
hold every prompt, one process writes `X.jsonl` whole, its manifest after it, and removes the parts.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf.data.jsonl import JsonlAppender, encode_row
from rrhf.errors import UserError
from rrhf.files import Digest, manifest_path, remove_abandoned, replaced_file
from rrhf.signals import StopRequest

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
# A part that has not grown for so long belongs to a process that will never end it.
STALLED_SECONDS = 3600.0


@dataclass(frozen=True)
class Place:
    """Where a row stands: the part, and the line's first byte and length there."""

    part: Path
    offset: int
    length: int


class Parts:
    """The part files of one output.

    Attributes:
        output: the file that they become.
        output_digest: of that file, once `merge` has ended.
        places: where the row of each prompt stands, by id, as far as it has been read.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.output_digest = Digest()
        self.places: dict[str, Place] = {}
        self._read_to: dict[Path, int] = {}

    def path_of(self, rank: int) -> Path:
        return self.output.with_name(f"{self._stem}.rank{rank}.jsonl")

    def paths(self) -> list[Path]:
        """The parts that are there, in the order of their ranks."""
        pattern = re.compile(re.escape(self._stem) + r"\.rank(\d+)\.jsonl")
        found = {
            int(match.group(1)): path
            for path in self.output.parent.iterdir()
            if (match := pattern.fullmatch(path.name))
        }
        return [found[rank] for rank in sorted(found)]

    def open_own(self, rank: int) -> JsonlAppender:
        """This process' part, locked against others, its torn last line cut.

        Raises:
            UserError: another process is writing it; it cannot be written.
        """
        return JsonlAppender(self.path_of(rank))

    def read_on(self) -> int:
        """Read what was appended since the last call; returns how many rows are known.

        A last line without its end is left for later: somebody is writing it, or was killed.
        """
        for path in self.paths():
            offset = self._read_to.get(path, 0)
            with open(path, "rb") as file:
                file.seek(offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    # The first row of a prompt counts; there is a second one only where two
                    # processes made the same, after their number changed.
                    row_id = json.loads(line)["id"]
                    self.places.setdefault(row_id, Place(path, offset, len(line)))
                    offset += len(line)
            self._read_to[path] = offset
        return len(self.places)

    def wait_for(self, ids: Sequence[str], stop: StopRequest, what_stands: str) -> None:
        """Return once the parts of all processes hold all the ids.

        Raises:
            StoppedBySignal: a signal came first.
            UserError: no part has grown for an hour.
        """
        known = self.read_on()
        grown_at = time.monotonic()
        while any(prompt_id not in self.places for prompt_id in ids):
            stop.raise_if_received(what_stands)
            if time.monotonic() - grown_at > STALLED_SECONDS:
                missing = sum(prompt_id not in self.places for prompt_id in ids)
                raise UserError(
                    f"{self.output}: {missing} of {len(ids)} prompts are still missing and no "
                    "other process has written for an hour; start the same command again"
                )
            time.sleep(POLL_SECONDS)
            if (now_known := self.read_on()) > known:
                known, grown_at = now_known, time.monotonic()

    def num_bytes(self) -> int:
        """The size of all parts; one that is removed meanwhile counts as nothing."""
        total = 0
        for path in self.paths():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def rows(self, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows of these prompts, in this order, one in memory at a time."""
        with ExitStack() as opened:
            files = {path: opened.enter_context(open(path, "rb")) for path in self.paths()}
            for prompt_id in ids:
                place = self.places[prompt_id]
                files[place.part].seek(place.offset)
                yield json.loads(files[place.part].read(place.length))

    def merge(self, ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Write the output whole from the "row" of each part row; yields these for counting.

        The output stands when the iterator ends.
        """
        with replaced_file(self.output) as file:
            for row in self.rows(ids):
                file.write(encode_row(row["row"]))
                yield row
        self.output_digest = file.digest

    def remove(self) -> None:
        for path in self.paths():
            path.unlink(missing_ok=True)

    def remove_half_written(self) -> None:
        """Remove what killed processes left of output and manifest (`rrhf.files.replaced_file`)."""
        remove_abandoned(self.output)
        remove_abandoned(manifest_path(self.output))

    @property
    def _stem(self) -> str:
        return self.output.name.removesuffix(".jsonl").removesuffix(".json")
