"""The candidate file: prompts, responses and scores as one JSON object a line, in RRHF's own form.

    {"query": "...", "responses": ["...", "..."], "scores": [0.3, -1.2]}

That is what RRHF published and reads, and it is read here unchanged, as lines or as one JSON
array. Beside these keys a row may have `messages` (the conversation behind the query), `id`,
`origin`, and, one entry a response, `sources` and `finish_reasons`; keys that are not known are
left alone. Scores may be missing or null where nothing has been scored yet.

Every mistake of a file is told with file, line, field and mend, up to 20, in one message. Not
mistakes: an empty response, equal scores, a single response, rows with unequally many responses.

Left out on purpose: other people's columns (`rrhf.data.sources`), and what a row is used for
(`rrhf.data.views`).
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast, overload

from rrhf.data.jsonl import Fault, Faults, Row, encode_row, open_bytes, scan_rows
from rrhf.errors import UserError
from rrhf.records import (
    FINISH_REASONS,
    ROLES,
    Candidate,
    CandidateSet,
    FinishReason,
    Message,
    set_id,
)
from rrhf.runs import (
    COMPLETE,
    PathLike,
    explained_os_errors,
    manifest_path,
    read_manifest,
    replaced_file,
    write_manifest,
)

logger = logging.getLogger(__name__)

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_VALUE = object()


class RowError(UserError):
    """One row's mistakes; the text has a line for each, `faults` the lines apart."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


class SeenIds:
    """The ids of a file so far, so that each row gets one of its own.

    Holds the ids alone (about 150 bytes a row).
    """

    def __init__(self) -> None:
        self._times: dict[str, int] = {}

    def give(self, candidate_set: CandidateSet) -> CandidateSet:
        """The set, with an occurrence number in its id ("-1", "-2", ...) if it has been seen."""
        base = candidate_set.id
        if base not in self._times:
            self._times[base] = 1
            return candidate_set
        times = self._times[base]
        while (fresh := f"{base}-{times}") in self._times:
            times += 1
        self._times[base] = times + 1
        self._times[fresh] = 1
        return replace(candidate_set, id=fresh)

    def __contains__(self, given_id: str) -> bool:
        return given_id in self._times

    def __len__(self) -> int:
        return len(self._times)


def _kind(value: object) -> str:
    """What a JSON value is, as a person says it, with the value where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.30}"
    if isinstance(value, str):
        return f"the text {json.dumps(value if len(value) < 30 else value[:27] + '...')}"
    return "a list" if isinstance(value, list) else "an object"


def _text_fault(value: object) -> str | None:
    if not isinstance(value, str):
        return f"must be a text, is {_kind(value)}; put it in quotes, or mend the row"
    if half := _SURROGATE.search(value):
        return (
            f"holds half a surrogate pair (\\u{ord(half.group()):04x} at character "
            f"{half.start() + 1}), which no tokenizer reads; remove it, or write the whole pair"
        )
    return None


class _RowReader:
    """Reads one row's fields and gathers what is wrong with them."""

    def __init__(self, row: Mapping[str, Any], where: str) -> None:
        self.row = row
        self.where = where
        self.faults: list[str] = []

    def fault(self, field: str, reason: str) -> None:
        self.faults.append(f"{self.where}: {field}: {reason}")

    def text(self, field: str, default: str | None = None) -> str:
        value = self.row.get(field, _NO_VALUE)
        if value is _NO_VALUE or (value is None and default is not None):
            if default is None:
                hint = ""
                if field == "query":
                    found = [k for k in ("prompt", "instruction", "chosen") if k in self.row]
                    hint = (
                        f" ({found[0]!r} is there: `rrhf data convert` reads it)" if found else ""
                    )
                self.fault(field, f"is missing{hint}; every row needs this text")
            return default or ""
        if reason := _text_fault(value):
            self.fault(field, reason)
            return ""
        return cast(str, value)

    def texts(self, field: str) -> list[str] | None:
        """The list of texts, or None where it cannot be had (said)."""
        value = self.row.get(field, _NO_VALUE)
        if value is _NO_VALUE:
            self.fault(field, "is missing; give a list of texts ([] for a prompt alone)")
            return None
        if not isinstance(value, list):
            self.fault(field, f"must be a list of texts, is {_kind(value)}; put it in [ ]")
            return None
        for number, item in enumerate(value):
            if reason := _text_fault(item):
                self.fault(f"{field}[{number}]", reason)
        return value

    def entries(self, field: str, responses: int | None, what: str) -> list[Any] | None:
        """A list with one entry a response; None where it is absent, null or wrong (said)."""
        value = self.row.get(field)
        if value is None:
            return None
        if not isinstance(value, list):
            self.fault(field, f"must be a list of {what}, is {_kind(value)}; mend the row")
            return None
        if responses is not None and len(value) != responses:
            self.fault(
                field,
                f"holds {len(value)} entries for {responses} responses; give one for each response"
                + (" (null where there is none)" if field != "finish_reasons" else ""),
            )
            return None
        return value

    def scores(self, responses: int | None) -> list[float | None] | None:
        values = self.entries("scores", responses, "numbers")
        if values is None:
            return None
        for number, value in enumerate(values):
            field = f"scores[{number}]"
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self.fault(field, f"must be a number or null, is {_kind(value)}; mend the score")
            elif not _is_finite(value):
                self.fault(
                    field,
                    f"is {value!r:.30}, no finite number; give the score, or null where there is "
                    "none",
                )
        return values

    def messages(self) -> tuple[Message, ...] | None:
        value = self.row.get("messages")
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            self.fault(
                "messages", f'must be a list of {{"role", "content"}}, is {_kind(value)}; mend it'
            )
            return None
        turns = []
        for number, turn in enumerate(value):
            field = f"messages[{number}]"
            if not isinstance(turn, dict):
                self.fault(field, f'must be {{"role", "content"}}, is {_kind(turn)}; mend it')
                continue
            role, content = turn.get("role"), turn.get("content")
            if role not in ROLES:
                self.fault(f"{field}.role", f"is {_kind(role)}; must be one of {', '.join(ROLES)}")
            elif reason := _text_fault(content):
                self.fault(f"{field}.content", reason)
            else:
                turns.append(Message(role, str(content)))
        if len(turns) < len(value):
            return None
        if turns[-1].role != "user":
            self.fault(
                "messages",
                f"end with the turn of the {turns[-1].role}; they are the prompt, so they end with "
                "the user's, and what follows belongs in responses",
            )
        return tuple(turns)

    def finish_reasons(self, responses: int | None) -> list[FinishReason] | None:
        values = self.entries("finish_reasons", responses, ", ".join(FINISH_REASONS))
        for number, value in enumerate(values or ()):
            if value not in FINISH_REASONS:
                self.fault(
                    f"finish_reasons[{number}]",
                    f"is {_kind(value)}; must be one of {', '.join(FINISH_REASONS)}",
                )
        return values

    def sources(self, responses: int | None) -> list[str] | None:
        values = self.entries("sources", responses, "texts")
        for number, value in enumerate(values or ()):
            if value is not None and (reason := _text_fault(value)):
                self.fault(f"sources[{number}]", reason)
        return values


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def parse_candidate_set(row: Any, where: str) -> CandidateSet:
    """One row of a candidate file as a record.

    A row without an id gets the one that its prompt gives; a file's reader numbers repeats.

    Args:
        row: the JSON value.
        where: "file:line", which begins every message.

    Raises:
        RowError: a `UserError` with one line for each mistake: `file:line: field: what, mend`.
    """
    if not isinstance(row, dict):
        raise RowError(
            [f'{where}: row: must be an object {{"query", "responses", ...}}, is {_kind(row)}']
        )
    reader = _RowReader(row, where)
    query = reader.text("query")
    responses = reader.texts("responses")
    number = None if responses is None else len(responses)
    scores = reader.scores(number)
    messages = reader.messages()
    finish_reasons = reader.finish_reasons(number)
    sources = reader.sources(number)
    origin = reader.text("origin", default="")
    given_id = reader.text("id", default="")
    if reader.faults:
        raise RowError(reader.faults)
    assert responses is not None, "a row without responses has been refused"
    candidates = tuple(
        Candidate(
            response=response,
            source=(sources[index] or "") if sources else "",
            score=_as_float(scores[index]) if scores else None,
            finish_reason=finish_reasons[index] if finish_reasons else "unknown",
        )
        for index, response in enumerate(responses)
    )
    return CandidateSet(
        id=given_id or set_id(query, messages),
        query=query,
        messages=messages,
        candidates=candidates,
        origin=origin,
    )


def _as_float(score: float | None) -> float | None:
    return None if score is None else float(score)


def candidate_set_to_row(candidate_set: CandidateSet) -> dict[str, Any]:
    """A record as a row: RRHF's keys first, the others only where they say something.

    `scores` is left out where nothing is scored, `id` where the prompt alone gives it.
    """
    candidates = candidate_set.candidates
    row: dict[str, Any] = {
        "query": candidate_set.query,
        "responses": [candidate.response for candidate in candidates],
    }
    if any(candidate.score is not None for candidate in candidates):
        row["scores"] = [candidate.score for candidate in candidates]
    if candidate_set.messages is not None:
        row["messages"] = [{"role": m.role, "content": m.content} for m in candidate_set.messages]
    if candidate_set.id != set_id(candidate_set.query, candidate_set.messages):
        row["id"] = candidate_set.id
    if candidate_set.origin:
        row["origin"] = candidate_set.origin
    if any(candidate.source for candidate in candidates):
        row["sources"] = [candidate.source for candidate in candidates]
    if any(candidate.finish_reason != "unknown" for candidate in candidates):
        row["finish_reasons"] = [candidate.finish_reason for candidate in candidates]
    return row


def require_finished(path: PathLike) -> dict[str, Any] | None:
    """The manifest of an input, which a stage may read only if it is whole; None without one.

    Raises:
        UserError: the manifest says that the file is unfinished.
    """
    manifest = read_manifest(path)
    if manifest is not None and manifest.get("status") != COMPLETE:
        raise UserError(
            f"{path}: its manifest ({manifest_path(path).name}) says "
            f"{manifest.get('status')!r}: the stage that writes it has not ended; run that stage "
            "again to finish it, or remove the manifest to use the rows that are there"
        )
    return manifest


def _scan_sets(path: PathLike) -> Iterator[tuple[Row, CandidateSet]]:
    """Rows with their sets, ids unique; from the first fault on, only more faults are looked for.

    Raises:
        UserError: at the end, with all faults, up to 20; at once, where the file is not to be read.
    """
    require_finished(path)
    faults = Faults()
    ids = SeenIds()
    rows = 0
    for item in scan_rows(path):
        rows += 1
        if isinstance(item, Fault):
            faults.add(f"{path}:{item.line}: {item.reason}")
        else:
            where = f"{path}:{item.line}"
            try:
                parsed = parse_candidate_set(item.value, where)
            except RowError as error:
                for text in error.faults:
                    faults.add(text)
            else:
                if parsed.id in ids and item.value.get("id"):
                    faults.add(
                        f"{where}: id: {parsed.id!r} stands in an earlier row; ids are unique in a "
                        "file: remove the key, and ids are made from the prompts"
                    )
                elif not faults:
                    yield item, ids.give(parsed)
        if faults.is_full:
            break
    faults.raise_if_any()
    if rows == 0:
        raise UserError(
            f"{path}: holds no rows; make the file again, or name the file that you meant"
        )


def read_candidate_sets(path: PathLike) -> Iterator[CandidateSet]:
    """The sets of a candidate file, one in memory at a time.

    Raises:
        UserError: the file is missing, empty, unfinished, or has faulty rows (sets before the first
            one have been yielded by then; open a `CandidateFile` to know before).
    """
    for _, candidate_set in _scan_sets(path):
        yield candidate_set


class CandidateFile(Sequence[CandidateSet]):
    """A candidate file by index: the places of its rows are in memory, the rows are not.

    A gzip file is unpacked to a temporary file. Reading does not move a file position, so that
    forked workers may read the same object.

    Attributes:
        path: the file, or what the spooled rows came from.
        manifest: the file's manifest, or None.
    """

    def __init__(self, path: PathLike) -> None:
        """Open and check the whole file.

        Raises:
            UserError: as `read_candidate_sets`, before anything is yielded.
        """
        self.path = Path(path)
        self.manifest = require_finished(path)
        self._offsets = array("Q")
        self._lengths = array("Q")
        self._repeats: dict[int, str] = {}  # rows whose id tells an earlier one apart
        for index, (row, candidate_set) in enumerate(_scan_sets(path)):
            self._offsets.append(row.offset)
            self._lengths.append(row.length)
            if "-" in candidate_set.id and not row.value.get("id"):
                self._repeats[index] = candidate_set.id
        self._file = _seekable(path)

    @classmethod
    def spool(cls, sets: Iterable[CandidateSet], name: PathLike) -> CandidateFile:
        """Sets of any source as a `CandidateFile`, held in a temporary file that nobody else sees.

        Ids that repeat get an occurrence number.
        """
        spooled = cls.__new__(cls)
        spooled.path = Path(name)
        spooled.manifest = None
        spooled._offsets = array("Q")
        spooled._lengths = array("Q")
        spooled._repeats = {}
        ids = SeenIds()
        position = 0
        file = cast(BinaryIO, tempfile.TemporaryFile(prefix="rrhf-"))  # noqa: SIM115
        with explained_os_errors(Path(tempfile.gettempdir()) / "rrhf-spool"):
            for candidate_set in sets:
                data = encode_row(candidate_set_to_row(ids.give(candidate_set)))
                file.write(data)
                spooled._offsets.append(position)
                spooled._lengths.append(len(data))
                position += len(data)
            file.flush()
        spooled._file = file
        return spooled

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> CandidateSet: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CandidateSet]: ...
    def __getitem__(self, index: int | slice) -> CandidateSet | Sequence[CandidateSet]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        data = os.pread(self._file.fileno(), self._lengths[number], self._offsets[number])
        try:
            parsed = parse_candidate_set(json.loads(data), f"{self.path}, row {number + 1}")
        except ValueError as error:
            raise UserError(
                f"{self.path}: row {number + 1} no longer reads as it did when the file was opened "
                f"({error}); do not change a file while it is used"
            ) from error
        return replace(parsed, id=self._repeats.get(number, parsed.id))

    def __iter__(self) -> Iterator[CandidateSet]:
        for number in range(len(self)):
            yield self[number]

    def close(self) -> None:
        self._file.close()


def _seekable(path: PathLike) -> BinaryIO:
    """The file itself, or its unpacked copy where it is gzip."""
    file = open_bytes(path)
    if not _is_gzip(path):
        return file
    temporary = cast(BinaryIO, tempfile.TemporaryFile(prefix="rrhf-"))  # noqa: SIM115
    with file, explained_os_errors(Path(tempfile.gettempdir()) / Path(path).name):
        shutil.copyfileobj(file, temporary, 1 << 20)
        temporary.flush()
    return temporary


def _is_gzip(path: PathLike) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def is_candidate_row(row: Any) -> TypeGuard[dict[str, Any]]:
    """True for a row that is meant as a candidate set, rightly filled or not."""
    return isinstance(row, dict) and "query" in row and "responses" in row


def write_candidate_sets(
    path: PathLike, sets: Iterable[CandidateSet], manifest: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a candidate file whole or not at all, then its manifest; gzip where the name says so.

    Ids that repeat get an occurrence number. If anything fails, file and manifest stay as before.

    Args:
        path: where to.
        sets: what, taken one at a time.
        manifest: what is to be known beside the counts (engine, scorer, seed, what was dropped).

    Returns:
        The manifest as written: "rows", "candidates", "scored_candidates" added.
    """
    rows = candidates = scored = 0
    ids = SeenIds()
    with replaced_file(path) as file:
        if os.fspath(path).endswith(".gz"):
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                sink = cast(BinaryIO, packed)
                for item in _unique(sets, ids):
                    sink.write(encode_row(candidate_set_to_row(item)))
                    rows, candidates, scored = _count(item, rows, candidates, scored)
        else:
            for item in _unique(sets, ids):
                file.write(encode_row(candidate_set_to_row(item)))
                rows, candidates, scored = _count(item, rows, candidates, scored)
        # From here on the old manifest would vouch for rows that it does not know.
        manifest_path(path).unlink(missing_ok=True)
    written = {
        "status": COMPLETE,
        "rows": rows,
        "candidates": candidates,
        "scored_candidates": scored,
        **(manifest or {}),
    }
    write_manifest(path, written)
    return written


def _unique(sets: Iterable[CandidateSet], ids: SeenIds) -> Iterator[CandidateSet]:
    for candidate_set in sets:
        yield ids.give(candidate_set)


def _count(item: CandidateSet, rows: int, candidates: int, scored: int) -> tuple[int, int, int]:
    return (
        rows + 1,
        candidates + len(item.candidates),
        scored + sum(score is not None for score in item.scores),
    )
