"""Check one row of a candidate file and read it into a record, or turn a record into a row.

Every message begins with "file:line: field:", says what is wrong, and ends with the fix.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rrhf.errors import UserError
from rrhf.records import (
    FINISH_REASONS,
    ROLES,
    CandidateSet,
    Columns,
    FinishReason,
    Message,
    set_id,
    set_of_columns,
)

_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_VALUE = object()

# Words in the names of columns that may hold ranks or scores.
_RANK_WORDS = {"rank", "place", "position"}
_SCORE_WORDS = _RANK_WORDS | {
    *("score", "reward", "rating", "ratings", "label", "labels", "preference", "preferences"),
}

# If the first row has one of these columns, which hold scores, the file is not read as a candidate
# file.
OTHER_SCORES = ("rewards", "ranks", "ranking")
CANDIDATE_COLUMNS = (
    *("query", "responses", "scores", "messages", "id", "origin", "sources", "finish_reasons"),
)
_COLUMNS, _ROLES, _REASONS = map(frozenset, (CANDIDATE_COLUMNS, ROLES, FINISH_REASONS))


class RowError(UserError):
    """The mistakes in a row: the message has one line per mistake; `faults` lists these lines."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


def kind_of(value: object) -> str:
    """Describe a JSON value for an error message: its type, and the value if it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value!r:.30}"
    if isinstance(value, str):
        return f"the text {json.dumps(value if len(value) < 30 else value[:27] + '...')}"
    return "a list" if isinstance(value, list) else "an object"


def text_fault(value: object) -> str | None:
    if not isinstance(value, str):
        fix = "give the text alone" if isinstance(value, (list, dict)) else "put it in quotes"
        return f"must be a text, is {kind_of(value)}; {fix}, or fix the row"
    if half := _SURROGATE.search(value):
        return (
            f"holds half a surrogate pair (\\u{ord(half.group()):04x} at character "
            f"{half.start() + 1}), which no tokenizer reads; remove it, or write the whole pair"
        )
    return None


def not_in_first_row(row: Mapping[str, Any], where: str, names: Sequence[str]) -> list[str]:
    """Return faults for columns that decide how a file is read but are missing in its first row."""
    return [
        f"{where}: {name}: is missing in the file's first row, so this column is not read; give it "
        f"in every row, or leave it out: --columns unread={name}"
        for name in names
        if row.get(name) is not None
    ]


def unread_scores(row: Mapping[str, Any], where: str, num_replies: int) -> list[str]:
    """Return faults for unread columns that seem to hold the scores of unscored replies.

    Args:
        row: the row as it is in the file.
        where: the row's place, which begins every message.
        num_replies: how many replies the row has, none of them scored.
    """
    told = []
    for name, value in row.items():
        words = set(re.split(r"[^a-z]+", str(name).lower()))
        if (
            isinstance(value, list)
            and len(value) == num_replies > 1
            and words & _SCORE_WORDS
            and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
        ):
            known = "ranks" if words & _RANK_WORDS else "scores"
            told.append(
                f"{where}: {name}: is not read, but holds a number for each reply, and the "
                f"replies have no scores; if the numbers score the replies: --columns "
                f"{known}={name} (scores: higher is better; ranks: 1 is best), else: "
                f"--columns unread={name}"
            )
    return told


class RowReader:
    """Reads the fields of a row and collects their faults."""

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
        if reason := text_fault(value):
            self.fault(field, reason)
            return ""
        return cast(str, value)

    def texts(self, field: str) -> list[str] | None:
        """Return the list of texts in a field; if it is not a list, None, and a fault is
        recorded."""
        value = self.row.get(field, _NO_VALUE)
        if value is _NO_VALUE:
            self.fault(field, "is missing; give a list of texts ([] for a prompt alone)")
            return None
        if not isinstance(value, list):
            self.fault(field, f"must be a list of texts, is {kind_of(value)}; put it in [ ]")
            return None
        for number, item in enumerate(value):
            if reason := text_fault(item):
                self.fault(f"{field}[{number}]", reason)
        return value

    def entries(self, field: str, responses: int | None, what: str) -> list[Any] | None:
        """Return the list in a field, with one entry per response; None if absent, null or wrong.

        A wrong field is recorded as a fault.
        """
        value = self.row.get(field)
        if value is None:
            return None
        if not isinstance(value, list):
            self.fault(field, f"must be a list of {what}, is {kind_of(value)}; fix the row")
            return None
        if responses is not None and len(value) != responses:
            self.fault(
                field,
                f"holds {len(value)} entries for {responses} responses; give one for each response"
                + (" (null where there is none)" if field != "finish_reasons" else ""),
            )
            return None
        return value

    def scores(self, responses: int | None, name: str = "scores") -> list[float | None] | None:
        values = self.entries(name, responses, "numbers")
        if values is None:
            return None
        for number, value in enumerate(values):
            field = f"{name}[{number}]"
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                self.fault(field, f"must be a number or null, is {kind_of(value)}; fix the score")
            elif not is_finite(value):
                self.fault(
                    field,
                    f"is {value!r:.30}, not a finite number; give the score, or null where there "
                    "is none",
                )
        return values

    def turns(self, field: str) -> tuple[Message, ...] | None:
        """Return the conversation in a field; None if it is absent, null or wrong.

        The last turn may have any role. A wrong field is recorded as a fault.
        """
        value = self.row.get(field)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            what = "an empty list" if value == [] else kind_of(value)
            self.fault(field, f'must be a list of {{"role", "content"}}, is {what}; fix the row')
            return None
        turns = []
        for number, turn in enumerate(value):
            place = f"{field}[{number}]"
            if not isinstance(turn, dict):
                self.fault(place, f'must be {{"role", "content"}}, is {kind_of(turn)}; fix it')
                continue
            role, content = turn.get("role"), turn.get("content")
            if not isinstance(role, str) or role not in ROLES:
                self.fault(
                    f"{place}.role", f"is {kind_of(role)}; must be one of {', '.join(ROLES)}"
                )
            elif reason := text_fault(content):
                self.fault(f"{place}.content", reason)
            else:
                turns.append(Message(role, str(content)))
        return tuple(turns) if len(turns) == len(value) else None

    def messages(self) -> tuple[Message, ...] | None:
        """Return the conversation behind the query; records a fault if the last turn is not the
        user's."""
        turns = self.turns("messages")
        if turns is not None and turns[-1].role != "user":
            self.fault(
                "messages",
                f"end with the turn of the {turns[-1].role}; messages are the prompt, so they must "
                "end with the user's turn; put what follows that turn in responses",
            )
        return turns

    def finish_reasons(self, responses: int | None) -> list[FinishReason] | None:
        values = self.entries("finish_reasons", responses, ", ".join(FINISH_REASONS))
        for number, value in enumerate(values or ()):
            if value not in FINISH_REASONS:
                self.fault(
                    f"finish_reasons[{number}]",
                    f"is {kind_of(value)}; must be one of {', '.join(FINISH_REASONS)}",
                )
        return values

    def sources(self, responses: int | None) -> list[str] | None:
        values = self.entries("sources", responses, "texts")
        for number, value in enumerate(values or ()):
            if value is not None and (reason := text_fault(value)):
                self.fault(f"sources[{number}]", reason)
        return values


def is_finite(value: int | float) -> bool:
    """Whether a number is finite as a float; False for integers too large for a float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def _record(row: dict[str, Any]) -> CandidateSet | None:
    """Make the record of a row; None if `RowReader` would find a fault."""
    get = row.get
    query: Any = get("query")
    responses, turns = get("responses"), get("messages")
    given_id: Any = get("id")
    origin: Any = get("origin")
    scores, sources, reasons = get("scores"), get("sources"), get("finish_reasons")
    if type(responses) is not list:
        return None
    for values in (scores, sources, reasons):
        if values is not None and (type(values) is not list or len(values) != len(responses)):
            return None
    origin = "" if origin is None else origin
    texts = [query, "" if given_id is None else given_id, origin, *responses]
    roles: list[str] | None = None
    contents: list[str] = []
    try:
        if turns is not None:
            roles = [turn["role"] for turn in turns]
            contents = [turn["content"] for turn in turns]
            if type(turns) is not list or not _ROLES.issuperset(roles) or roles[-1:] != ["user"]:
                return None
            texts += contents
        if scores:
            scores = [None if x is None else _plain_number(x) for x in scores]
        if sources:
            sources = ["" if source is None else source for source in sources]
            texts += sources
        if reasons and not _REASONS.issuperset(reasons):
            return None
        joined = "".join(texts)
    except (TypeError, ValueError, KeyError):
        return None
    if not joined.isascii() and _SURROGATE.search(joined):
        return None
    columns = Columns(roles, contents, responses, sources, scores, reasons)
    return set_of_columns(query, columns, origin, given_id or "")


def _plain_number(value: Any) -> float:
    """Convert a finite number to a float.

    Raises:
        ValueError: the value is not a finite number.
    """
    if (type(value) is float or type(value) is int) and is_finite(value):
        return float(value)
    raise ValueError


def parse_candidate_set(row: Any, where: str) -> CandidateSet:
    """Read one row of a candidate file into a record.

    A row without an id gets an id made from its prompt. Repeated ids are not handled here: the
    reader of the file numbers them.

    Args:
        row: the JSON value.
        where: "file:line", which begins every message.

    Raises:
        RowError: a `UserError` with one line for each mistake: `file:line: field: what, fix`.
    """
    is_row = isinstance(row, dict)
    # Unknown columns may hold misnamed scores, so such rows are checked below.
    if is_row and row.keys() <= _COLUMNS and (found := _record(row)) is not None:
        return found
    if not is_row:
        raise RowError(
            [f'{where}: row: must be an object {{"query", "responses", ...}}, is {kind_of(row)}']
        )
    reader = RowReader(row, where)
    reader.faults += not_in_first_row(row, where, OTHER_SCORES)
    reader.text("query")
    responses = reader.texts("responses")
    number = None if responses is None else len(responses)
    scores = reader.scores(number)
    if number and not any(isinstance(score, (int, float)) for score in scores or ()):
        reader.faults += unread_scores(row, where, number)
    reader.messages()
    reader.finish_reasons(number)
    reader.sources(number)
    reader.text("origin", default="")
    reader.text("id", default="")
    if reader.faults:
        raise RowError(reader.faults)
    found = _record(row)
    assert found is not None, "a row without faults is a record"
    return found


# The bytes after the responses in a line. They cannot occur inside a text, where quotes are
# escaped.
_AFTER_RESPONSES = re.compile(
    rb'\], "(?:scores": \[[^]]*(\])|(?:messages|id|origin|sources|finish_reasons)": )|\]\}\n$'
)


def with_scores(line: bytes, scores: bytes | None) -> bytes:
    """Replace the scores in a line that `candidate_set_to_row` and `encode_row` made.

    Args:
        line: the row.
        scores: the new scores as a JSON array; None = the row has no scores.

    Raises:
        ValueError: these two functions did not make the line.
    """
    place = _AFTER_RESPONSES.search(line)
    if place is None:
        raise ValueError(f"not a line that `encode_row` wrote: {line!r:.100}")
    begin, end = place.start(), max(place.start(), place.start(1))
    middle = b"" if scores is None else b', "scores": ' + scores
    return line[: begin + 1] + middle + line[end + 1 :]


def candidate_set_to_row(candidate_set: CandidateSet) -> dict[str, Any]:
    """Turn a record into a row: RRHF's keys first, then all other keys that are not empty.

    `scores` is left out if no candidate has a score, `id` if it is the id made from the prompt.
    """
    candidates = candidate_set.candidates
    row: dict[str, Any] = {
        "query": candidate_set.query,
        "responses": list(candidate_set.responses),
    }
    scores = [candidate.score for candidate in candidates]
    if scores.count(None) < len(scores):
        row["scores"] = scores
    if candidate_set.messages is not None:
        row["messages"] = candidate_set.conversation
    if candidate_set.id != set_id(candidate_set.query, candidate_set.messages):
        row["id"] = candidate_set.id
    if candidate_set.origin:
        row["origin"] = candidate_set.origin
    sources = [candidate.source for candidate in candidates]
    if any(sources):
        row["sources"] = sources
    reasons = [candidate.finish_reason for candidate in candidates]
    if reasons.count("unknown") < len(reasons):
        row["finish_reasons"] = reasons
    return row
