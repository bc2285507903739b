"""The columns that data come in, each read into the one record by a small function.

A layout is told by the columns of a file's first row; the rest of the file must follow it. A row
that does not (a key is missing, a type is wrong) is a mistake and is told with its place; a row
that reads well but is of no use is dropped by a rule stated here, and counted:

- `prompts_differ`: the two transcripts of a pair do not share their prompt, so that the pair says
  nothing about the replies;
- `prompt_ends_with_assistant`: the turn before the reply is the assistant's own, so that there is
  no user's turn to answer;
- `empty_reply`: a reply of a pair or demonstration is empty or white space, as happens where an
  annotator's tool lost it (in a candidate file, where a policy may have written it, it is kept);
- `equal_replies`: both replies of a pair are the same text, so that neither is preferred.

Neighbouring turns of one speaker are joined by a blank line and counted (`joined_turns`), because
many chat templates insist on turns that alternate. In a conversation, the last turn of the
assistant is the response; earlier ones are part of the prompt.

Left out on purpose: where rows come from (`rrhf.data.sources`) and candidate files' own rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rrhf.data.candidate_rows import RowError, RowReader, kind_of, parse_candidate_set, text_fault
from rrhf.data.chat_format import parse_hh_transcript, render_messages
from rrhf.errors import UserError
from rrhf.records import (
    CHOSEN_SOURCE,
    REJECTED_SOURCE,
    Candidate,
    CandidateSet,
    Message,
    set_id,
)

logger = logging.getLogger(__name__)

QueryFormat = Literal["hh", "alpaca", "raw"]


@dataclass
class SourceCounts:
    """What became of the rows that were read.

    Attributes:
        read: rows seen.
        kept: sets yielded.
        dropped: rows left out, by reason.
        mended: rows changed in passing, by reason; they are kept.
        query_formats: how the `query` was rendered: "hh", "alpaca", or "raw" = as it was.
    """

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    mended: Counter[str] = field(default_factory=Counter)
    query_formats: Counter[str] = field(default_factory=Counter)

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out; the first of each reason is logged with its place."""
        if reason not in self.dropped:
            logger.info("%s: left out (%s); more of this kind are only counted", where, reason)
        self.dropped[reason] += 1

    def mend(self, reason: str, where: str) -> None:
        """Count a row that was changed; the first of each reason is logged with its place."""
        if reason not in self.mended:
            logger.info("%s: changed (%s); more of this kind are only counted", where, reason)
        self.mended[reason] += 1

    def as_dict(self) -> dict[str, Any]:
        """For a manifest or a table."""
        return {
            "rows_read": self.read,
            "rows_kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "mended": dict(sorted(self.mended.items())),
            "query_formats": dict(sorted(self.query_formats.items())),
        }


class _Reading:
    """One row on its way to a record."""

    def __init__(self, row: Mapping[str, Any], where: str, counts: SourceCounts) -> None:
        self.row = row
        self.where = where
        self.counts = counts
        self.reader = RowReader(row, where)

    def raise_faults(self) -> None:
        if self.reader.faults:
            raise RowError(self.reader.faults)

    def wrong(self, column: str, reason: str) -> RowError:
        self.reader.fault(column, reason)
        return RowError(self.reader.faults)

    def prompt(self, turns: Sequence[Message]) -> tuple[Message, ...] | None:
        """The turns as a prompt, neighbours joined; None (counted) if the user does not end it."""
        if not turns or turns[-1].role != "user":
            self.counts.drop("prompt_ends_with_assistant", self.where)
            return None
        joined: list[Message] = []
        for turn in turns:
            if joined and joined[-1].role == turn.role:
                turn = Message(turn.role, f"{joined.pop().content}\n\n{turn.content}")
            joined.append(turn)
        if len(joined) < len(turns):
            self.counts.mend("joined_turns", self.where)
        return tuple(joined)

    def made(
        self,
        query: str | tuple[Message, ...],
        replies: Sequence[tuple[str, str]] = (),
        query_format: QueryFormat = "hh",
    ) -> CandidateSet | None:
        """The set, or None (counted) where its replies are of no use.

        Args:
            query: the conversation, or a text that is taken as it is.
            replies: (source, text) of each.
            query_format: how a conversation is rendered as `query`.
        """
        texts = [text for _, text in replies]
        if any(not text.strip() for text in texts):
            self.counts.drop("empty_reply", self.where)
            return None
        if len(texts) == 2 and texts[0].strip() == texts[1].strip():
            self.counts.drop("equal_replies", self.where)
            return None
        candidates = tuple(Candidate(text, source) for source, text in replies)
        if isinstance(query, str):
            self.counts.query_formats["raw"] += 1
            return CandidateSet(set_id(query), query, None, candidates)
        self.counts.query_formats[query_format] += 1
        text = render_messages(query_format, query)
        return CandidateSet(set_id(text, query), text, query, candidates)

    def text_prompt(self, column: str) -> str | tuple[Message, ...] | None:
        """A text column as a prompt: an HH transcript as its turns, any other text as it is."""
        text = self.reader.text(column)
        self.raise_faults()
        if not is_hh_prompt(text):
            return text
        return self.prompt(parse_hh_transcript(text))


def is_hh_prompt(text: str) -> bool:
    """True for a text in HH's form: begins with a human's turn, ends with the assistant's cue."""
    return text.lstrip("\n").startswith("Human:") and text.rstrip().endswith("\n\nAssistant:")


def _without_reply(turns: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """A conversation as prompt and reply; the reply is empty where the user has the last word."""
    if turns and turns[-1].role == "assistant":
        return tuple(turns[:-1]), turns[-1].content
    return tuple(turns), ""


def _read_transcripts(reading: _Reading) -> CandidateSet | None:
    """HH: `chosen` and `rejected`, each a whole transcript that ends with its reply."""
    conversations = []
    for column in ("chosen", "rejected"):
        text = reading.reader.text(column)
        reading.raise_faults()
        try:
            conversations.append(_without_reply(parse_hh_transcript(text)))
        except ValueError:
            raise reading.wrong(
                column,
                'has no "\\n\\nHuman:" turn; give whole transcripts, or a column `prompt` beside '
                "the two replies",
            ) from None
    return _pair_of_conversations(reading, *conversations)


def _pair_of_conversations(
    reading: _Reading,
    chosen: tuple[tuple[Message, ...], str],
    rejected: tuple[tuple[Message, ...], str],
) -> CandidateSet | None:
    if chosen[0] != rejected[0]:
        reading.counts.drop("prompts_differ", reading.where)
        return None
    prompt = reading.prompt(chosen[0])
    if prompt is None:
        return None
    return reading.made(prompt, ((CHOSEN_SOURCE, chosen[1]), (REJECTED_SOURCE, rejected[1])))


def _turns(reading: _Reading, column: str) -> tuple[Message, ...]:
    turns = reading.reader.turns(column)
    reading.raise_faults()
    if turns is None:
        raise reading.wrong(column, 'is null; give a list of {"role", "content"}')
    return turns


def _read_preference(reading: _Reading) -> CandidateSet | None:
    """TRL: `prompt`, `chosen`, `rejected`, texts or conversations; the prompt may stand in both."""
    row = reading.row
    if not isinstance(row.get("chosen"), list):
        return _read_text_preference(reading)
    prompt: tuple[Message, ...] = ()
    chosen, rejected = _turns(reading, "chosen"), _turns(reading, "rejected")
    if isinstance(row.get("prompt"), list):
        prompt = _turns(reading, "prompt")
    elif isinstance(row.get("prompt"), str) and chosen[0].role == "assistant":
        prompt = (Message("user", reading.reader.text("prompt")),)
        reading.raise_faults()
    return _pair_of_conversations(
        reading, _without_reply(prompt + chosen), _without_reply(prompt + rejected)
    )


def _read_text_preference(reading: _Reading) -> CandidateSet | None:
    if reading.row.get("prompt") is None:
        return _read_transcripts(reading)
    chosen, rejected = reading.reader.text("chosen"), reading.reader.text("rejected")
    reading.raise_faults()
    if isinstance(reading.row["prompt"], list):
        prompt = reading.prompt(_turns(reading, "prompt"))
        if prompt is None:
            return None
        return _pair_of_conversations(reading, (prompt, chosen), (prompt, rejected))
    given = reading.row["prompt"]
    query = reading.text_prompt("prompt")
    if query is None:
        return None
    if chosen.startswith(given) and rejected.startswith(given):
        chosen, rejected = chosen[len(given) :], rejected[len(given) :]
    if not isinstance(query, str):
        chosen, rejected = chosen.removeprefix(" "), rejected.removeprefix(" ")
    return reading.made(query, ((CHOSEN_SOURCE, chosen), (REJECTED_SOURCE, rejected)))


def _read_numbered_preference(reading: _Reading) -> CandidateSet | None:
    """PaddleNLP: `prompt`, `response_0`, `response_1`, `better_response_id` (0 or 1)."""
    prompt = reading.reader.text("prompt")
    replies = [reading.reader.text("response_0"), reading.reader.text("response_1")]
    better = reading.row.get("better_response_id")
    if isinstance(better, bool) or better not in (0, 1):
        reading.reader.fault("better_response_id", f"is {kind_of(better)}; must be 0 or 1")
    reading.raise_faults()
    assert isinstance(better, int), "any other type has been refused"
    return reading.made(
        (Message("user", prompt),),
        ((CHOSEN_SOURCE, replies[better]), (REJECTED_SOURCE, replies[1 - better])),
    )


def _read_raw_sample(reading: _Reading) -> CandidateSet | None:
    """PaddleNLP's RawSample: `input` (a text, or turns from the user to the user), `answer`,
    `other_answer`, `better` (True: `answer` is), or `dialogue` (turns from the user on)."""
    row, reader = reading.row, reading.reader
    column = "input" if row.get("input") is not None else "dialogue"
    value = row.get(column)
    texts = value if isinstance(value, list) else [value]
    for number, text in enumerate(texts):
        if reason := text_fault(text):
            reader.fault(f"{column}[{number}]" if isinstance(value, list) else column, reason)
    if not texts:
        reader.fault(column, "is an empty list; give the turns, the user's first")
    if column == "input" and len(texts) % 2 == 0 and texts:
        reader.fault(column, f"has {len(texts)} turns; it begins and ends with the user's, so odd")
    replies: list[tuple[str, str]] = []
    if row.get("answer") is not None or row.get("other_answer") is not None:
        replies.append((CHOSEN_SOURCE, reader.text("answer")))
    if row.get("other_answer") is not None:
        replies.append((REJECTED_SOURCE, reader.text("other_answer")))
        if not isinstance(row.get("better"), bool):
            reader.fault("better", f"is {kind_of(row.get('better'))}; must be true or false")
        elif not row["better"]:
            replies = [(CHOSEN_SOURCE, replies[-1][1]), (REJECTED_SOURCE, replies[0][1])]
    reading.raise_faults()
    turns = tuple(
        Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)
    )
    if column == "dialogue":
        return _conversation(reading, turns)
    return reading.made(turns, replies)


def _read_alpaca(reading: _Reading) -> CandidateSet | None:
    """Alpaca: `instruction`, `input` (may be empty), `output` (without it, a prompt)."""
    asked = reading.reader.text("instruction")
    given = reading.reader.text("input", default="")
    has_output = reading.row.get("output") is not None
    output = reading.reader.text("output") if has_output else ""
    reading.raise_faults()
    prompt = (Message("user", f"{asked}\n{given}" if given.strip() else asked),)
    replies = ((CHOSEN_SOURCE, output),) if has_output else ()
    return reading.made(prompt, replies, query_format="alpaca")


def _conversation(reading: _Reading, turns: tuple[Message, ...]) -> CandidateSet | None:
    """A demonstration where the assistant has the last word, else a prompt."""
    before, reply = _without_reply(turns)
    prompt = reading.prompt(before)
    if prompt is None:
        return None
    return reading.made(prompt, ((CHOSEN_SOURCE, reply),) if len(before) < len(turns) else ())


def _read_messages(reading: _Reading) -> CandidateSet | None:
    """`messages`: a conversation; its last turn, if the assistant's, is the response."""
    return _conversation(reading, _turns(reading, "messages"))


def _read_completion(reading: _Reading) -> CandidateSet | None:
    """TRL: `prompt` and `completion`, texts or conversations."""
    row = reading.row
    if isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list):
        turns: tuple[Message, ...] = ()
        for column in ("prompt", "completion"):
            if isinstance(row.get(column), list):
                turns += _turns(reading, column)
            else:
                role = "user" if column == "prompt" else "assistant"
                turns += (Message(role, reading.reader.text(column)),)
        reading.raise_faults()
        return _conversation(reading, turns)
    completion = reading.reader.text("completion")
    query = reading.text_prompt("prompt")
    if query is None:
        return None
    bare = completion if isinstance(query, str) else completion.removeprefix(" ")
    return reading.made(query, ((CHOSEN_SOURCE, bare),))


def _read_prompt(reading: _Reading) -> CandidateSet | None:
    """`prompt` alone: a text or a conversation."""
    if isinstance(reading.row.get("prompt"), list):
        prompt = reading.prompt(_turns(reading, "prompt"))
        return None if prompt is None else reading.made(prompt)
    query = reading.text_prompt("prompt")
    return None if query is None else reading.made(query)


def _read_query(reading: _Reading) -> CandidateSet | None:
    """`query` alone: a candidate row that has no responses yet."""
    if "responses" in reading.row:
        raise reading.wrong(
            "responses", "is missing in the file's first row; give it in every row, or in none"
        )
    if reading.row.keys() & {"scores", "sources", "finish_reasons"}:
        return _read_candidates(reading)
    reading.counts.query_formats["raw"] += 1
    return parse_candidate_set({**reading.row, "responses": []}, reading.where)


def _read_candidates(reading: _Reading) -> CandidateSet | None:
    """A candidate row: `query`, `responses`, and what else it may have."""
    reading.counts.query_formats["raw"] += 1
    return parse_candidate_set(reading.row, reading.where)


def _read_scored_prompts(reading: _Reading) -> CandidateSet | None:
    """RRHF's scored files: `prompt`, `response` (a list), `scores`."""
    reading.counts.query_formats["raw"] += 1
    renamed = {
        "query": reading.row.get("prompt"),
        "responses": reading.row.get("response"),
        "scores": reading.row.get("scores"),
    }
    return parse_candidate_set(renamed, reading.where)


@dataclass(frozen=True)
class Layout:
    """A way in which data come.

    Attributes:
        name: as tables and messages call it.
        columns: those that tell it; a row has all of them.
        read: makes a record of a row; None = dropped, counted.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[_Reading], CandidateSet | None]


# In this order: a row may have the columns of several, the first one counts.
LAYOUTS: tuple[Layout, ...] = (
    Layout("candidates", ("query", "responses"), _read_candidates),
    Layout("query", ("query",), _read_query),
    Layout(
        "numbered preference",
        ("prompt", "response_0", "response_1", "better_response_id"),
        _read_numbered_preference,
    ),
    Layout("preference", ("chosen", "rejected"), _read_preference),
    Layout("alpaca", ("instruction",), _read_alpaca),
    Layout("scored prompts", ("prompt", "response", "scores"), _read_scored_prompts),
    Layout("completion", ("prompt", "completion"), _read_completion),
    Layout("messages", ("messages",), _read_messages),
    Layout("prompt", ("prompt",), _read_prompt),
    Layout("raw sample", ("input",), _read_raw_sample),
    Layout("dialogue", ("dialogue",), _read_raw_sample),
)


def find_layout(row: Any, where: str) -> Layout:
    """The layout that a file's first row tells.

    Raises:
        UserError: the row is no object, or has the columns of no layout.
    """
    if not isinstance(row, Mapping):
        raise UserError(
            f"{where}: row: must be an object with named columns, is {kind_of(row)}; write one "
            "JSON object a line"
        )
    for layout in LAYOUTS:
        if all(column in row for column in layout.columns):
            return layout
    known = "; ".join(", ".join(layout.columns) for layout in LAYOUTS)
    raise UserError(
        f"{where}: row: its columns ({', '.join(map(str, row)) or 'none'}) are none that can be "
        f"read; rename them to one of: {known}"
    )


def read_row(layout: Layout, row: Any, where: str, counts: SourceCounts) -> CandidateSet | None:
    """One row of a known layout; None where it is dropped.

    Raises:
        RowError: with a line for each mistake.
    """
    if not isinstance(row, Mapping):
        raise RowError([f"{where}: row: must be an object, is {kind_of(row)}; mend it"])
    counts.read += 1
    missing = [column for column in layout.columns if column not in row]
    if missing:
        raise RowError(
            [
                f"{where}: {column}: is missing (the file's first row has it); every row needs it"
                for column in missing
            ]
        )
    found = layout.read(_Reading(row, where, counts))
    counts.kept += found is not None
    return found
