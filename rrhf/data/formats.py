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
- `equal_replies`: both replies of a pair are the same text, so that neither is preferred;
- `empty_prompt`: nothing is asked;
- `unwanted_reply`: a single reply that its row labels as a bad one.

A column that is not read is named. Where only a prompt can be read of a row that seems to hold
replies, that is a mistake: no row is emptied in silence.

Neighbouring turns of one speaker are joined by a blank line and counted (`joined_turns`), because
many chat templates insist on turns that alternate. In a conversation, the last turn of the
assistant is the response; earlier ones are part of the prompt.

Left out on purpose: where rows come from (`rrhf.data.sources`) and candidate files' own rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rrhf.data.candidate_rows import (
    CANDIDATE_COLUMNS,
    OTHER_SCORES,
    RowError,
    is_finite,
    kind_of,
    not_in_first_row,
    parse_candidate_set,
    text_fault,
    unread_scores,
)
from rrhf.data.chat_format import parse_hh_transcript
from rrhf.data.columns import (
    CONVERSATIONS,
    KNOWN,
    PROMPTS,
    REPLIES,
    REPLY_LISTS,
    SCORES,
    first_of,
    near_hint,
    replies_not_read,
)
from rrhf.data.reading import Reading, SourceCounts, is_hh_prompt
from rrhf.data.reply_lists import read_ranking, read_replies_of, read_reply_list
from rrhf.errors import UserError
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, Candidate, CandidateSet, Message

__all__ = [
    *("CANDIDATES", "CANDIDATE_COLUMNS", "LAYOUTS", "Layout", "SourceCounts"),
    *("find_layout", "is_candidate_row", "is_hh_prompt", "read_row"),
]

logger = logging.getLogger(__name__)

CANDIDATES = "candidates"


def _without_reply(turns: Sequence[Message]) -> tuple[tuple[Message, ...], str]:
    """A conversation as prompt and reply; the reply is empty where the user has the last word."""
    if turns and turns[-1].role == "assistant":
        return tuple(turns[:-1]), turns[-1].content
    return tuple(turns), ""


def _read_transcripts(reading: Reading) -> CandidateSet | None:
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
                'has no "\\n\\nHuman:" turn; give whole transcripts, or a column `prompt` next to '
                "the two replies",
            ) from None
    return _pair_of_conversations(reading, *conversations)


def _pair_of_conversations(
    reading: Reading,
    chosen: tuple[tuple[Message, ...], str],
    rejected: tuple[tuple[Message, ...], str],
) -> CandidateSet | None:
    if chosen[0] != rejected[0]:
        reading.counts.drop("prompts_differ", reading.where)
        return None
    prompt = reading.prompt(chosen[0])
    if prompt is None:
        return None
    replies = ((CHOSEN_SOURCE, chosen[1]), (REJECTED_SOURCE, rejected[1]))
    return reading.made(reading.with_system(prompt), replies)


def _read_preference(reading: Reading) -> CandidateSet | None:
    """TRL: `prompt`, `chosen`, `rejected`, texts or conversations; the prompt may stand in both."""
    if not isinstance(reading.row.get("chosen"), list):
        return _read_text_preference(reading)
    chosen, rejected = reading.turns("chosen"), reading.turns("rejected")
    prompt: tuple[Message, ...] = ()
    column = first_of(reading.row, PROMPTS)
    if column is not None and isinstance(reading.row[column], list):
        prompt = reading.turns(column)
    elif column is not None and chosen[0].role == "assistant":
        found = reading.find_prompt()
        if found is None:
            return None
        prompt = (Message("user", found[0]),) if isinstance(found[0], str) else found[0]
    return _pair_of_conversations(
        reading, _without_reply(_joined(prompt, chosen)), _without_reply(_joined(prompt, rejected))
    )


def _joined(prompt: tuple[Message, ...], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The prompt and the turns behind it, which may repeat it, with or without its system turn."""
    asked = tuple(turn for turn in prompt if turn.role != "system")
    if turns[: len(prompt)] == prompt:
        return turns
    if asked and turns[: len(asked)] == asked:
        return prompt[: len(prompt) - len(asked)] + turns
    return prompt + turns


def _read_text_preference(reading: Reading) -> CandidateSet | None:
    column = first_of(reading.row, (*PROMPTS, *CONVERSATIONS))
    if column is None or (column != "prompt" and _holds_transcripts(reading)):
        return _read_transcripts(reading)
    chosen, rejected = reading.reader.text("chosen"), reading.reader.text("rejected")
    reading.raise_faults()
    found = reading.find_prompt()
    if found is None:
        return None
    query, query_format = found
    given = reading.row[column]
    if not isinstance(given, str):
        assert not isinstance(query, str), "a conversation is no text"
        return _pair_of_conversations(reading, (query, chosen), (query, rejected))
    if all(_repeats(given, text) for text in (chosen, rejected)):
        return _read_transcripts(reading)
    if chosen.startswith(given) and rejected.startswith(given):
        chosen, rejected = chosen[len(given) :], rejected[len(given) :]
    if is_hh_prompt(given):
        chosen, rejected = chosen.removeprefix(" "), rejected.removeprefix(" ")
    return reading.made(query, ((CHOSEN_SOURCE, chosen), (REJECTED_SOURCE, rejected)), query_format)


def _repeats(prompt: str, text: str) -> bool:
    """Whether a text is an HH transcript in which a plain prompt is the user's first or last turn
    before the reply."""
    if not text.lstrip("\n").startswith("Human:"):
        return False
    turns, reply = _without_reply(parse_hh_transcript(text))
    asked = Message("user", prompt.strip())
    ends = [Message(turn.role, turn.content.strip()) for turn in (*turns[:1], *turns[-1:])]
    return bool(reply) and asked in ends


def _holds_transcripts(reading: Reading) -> bool:
    """Whether `chosen` is a whole HH transcript, which repeats the conversation."""
    chosen = reading.row["chosen"]
    return isinstance(chosen, str) and chosen.lstrip("\n").startswith("Human:")


def _read_numbered_preference(reading: Reading) -> CandidateSet | None:
    """PaddleNLP: `prompt`, `response_0`, `response_1`, `better_response_id` (0 or 1)."""
    prompt = reading.reader.text("prompt")
    replies = [reading.reader.text("response_0"), reading.reader.text("response_1")]
    better = reading.row.get("better_response_id")
    if isinstance(better, bool) or better not in (0, 1):
        reading.reader.fault("better_response_id", f"is {kind_of(better)}; must be 0 or 1")
    reading.raise_faults()
    assert isinstance(better, (int, float)), "any other type has been refused"
    chosen = replies.pop(int(better))  # a table with gaps has 1.0 for 1
    return reading.made(
        (Message("user", prompt),), ((CHOSEN_SOURCE, chosen), (REJECTED_SOURCE, replies[0]))
    )


def _read_raw_sample(reading: Reading) -> CandidateSet | None:
    """PaddleNLP's RawSample: `input` (a text, or turns from the user to the user), `answer`,
    `other_answer`, `better` (True: `answer` is), or `dialogue` (turns from the user on); in place
    of `answer` also `output` and its like."""
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
    elif column == "input" and (other := first_of(row, REPLIES)) is not None:
        replies.append((CHOSEN_SOURCE, reader.text(other)))
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
    if len(replies) == 1 and _is_unwanted(reading):
        return None
    return reading.made(reading.with_system(turns), replies)


def _is_unwanted(reading: Reading) -> bool:
    """Whether `label` calls the row's one reply a bad one; such a row is counted as dropped.

    Raises:
        RowError: the label is no truth value: neither 0 or 1 nor true or false.
    """
    value = reading.row.get("label")
    if isinstance(value, str):
        label: Any = {"true": True, "false": False}.get(value.strip().lower())
    else:
        label = value if isinstance(value, (int, float)) and value in (0, 1) else None
    if value is None or label:
        return False
    if label is None:
        raise reading.wrong(
            "label",
            f"is {value!r:.30}; must be true or false, or 1 or 0 (is the reply a good one?); fix "
            "it, or leave the column out: --columns unread=label",
        )
    reading.counts.drop("unwanted_reply", reading.where)
    return True


def _conversation(reading: Reading, turns: tuple[Message, ...]) -> CandidateSet | None:
    """A demonstration where the assistant has the last word, else a prompt."""
    before, reply = _without_reply(turns)
    if len(before) < len(turns) and _is_unwanted(reading):
        return None
    prompt = reading.prompt(before)
    if prompt is None:
        return None
    replies = ((CHOSEN_SOURCE, reply),) if len(before) < len(turns) else ()
    return reading.made(reading.with_system(prompt), replies)


def _read_messages(reading: Reading) -> CandidateSet | None:
    """`messages`: a conversation; its last turn, if the assistant's, is the response, else a column
    of its own may hold it."""
    row = reading.row
    column = first_of(row, CONVERSATIONS)
    if column is None:
        column = next(name for name in CONVERSATIONS if name in row)
    turns = reading.turns(column)
    if turns[-1].role == "user" and isinstance(row.get(first_of(row, REPLIES) or ""), str):
        return _read_reply(reading)
    return _conversation(reading, turns)


def _read_reply(reading: Reading) -> CandidateSet | None:
    """A prompt and one reply, texts or conversations: a demonstration."""
    row = reading.row
    column = first_of(row, REPLIES)
    if column is None:
        return _read_prompt_where_null(reading)
    value = row[column]
    if _is_unwanted(reading):
        return None
    if isinstance(value, list) and not (value and isinstance(value[0], dict)):
        return read_replies_of(reading, column)
    if isinstance(value, list):
        found = reading.find_prompt()
        turns = reading.turns(column)
        if found is None:
            return None
        asked = found[0]
        before = (Message("user", asked),) if isinstance(asked, str) else asked
        return _conversation(reading, _joined(before, turns))
    reply = reading.reader.text(column)
    reading.raise_faults()
    found = reading.find_prompt()
    if found is None:
        return None
    query, query_format = found
    prompt = first_of(row, PROMPTS)
    if prompt is not None and isinstance(row[prompt], str) and is_hh_prompt(row[prompt]):
        reply = reply.removeprefix(" ")
    scored = first_of(row, SCORES)
    if scored is None:
        return reading.made(query, ((CHOSEN_SOURCE, reply),), query_format)
    return _with_score(reading, reply, scored)


def _with_score(reading: Reading, reply: str, column: str) -> CandidateSet | None:
    """One reply with a number: not one to imitate, for its score may be a bad one."""
    score = reading.row[column]
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise reading.wrong(
            column,
            f"must be a number, is {kind_of(score)}; fix it, or leave the column out: --columns "
            f"unread={column}",
        )
    if not is_finite(score):
        raise reading.wrong(
            column,
            f"is {score!r:.30}, no finite number; give the score, or leave the column out: "
            f"--columns unread={column}",
        )
    found = reading.find_prompt()
    if found is None:
        return None
    reading.counts.scores_from[column] += 1
    return reading.with_candidates(found[0], (Candidate(reply, "", float(score)),), found[1])


def _read_prompt_where_null(reading: Reading) -> CandidateSet | None:
    """The reply's column is there and null: an instruction without output is a prompt."""
    if "instruction" in reading.row:
        return _read_prompt(reading)
    column = next(name for name in REPLIES if name in reading.row)
    reading.reader.text(column)
    raise RowError(reading.reader.faults)


def _read_prompt(reading: Reading) -> CandidateSet | None:
    """A prompt alone: a text or a conversation."""
    found = reading.find_prompt()
    return None if found is None else reading.made(found[0], (), found[1])


def _read_query(reading: Reading) -> CandidateSet | None:
    """`query` alone: a candidate row that has no responses yet."""
    if "responses" in reading.row:
        raise reading.wrong(
            "responses", "is missing in the file's first row; give it in every row, or in none"
        )
    if reading.row.keys() & {"scores", "sources", "finish_reasons"}:
        return _read_candidates(reading)
    reading.counts.query_formats["raw"] += 1
    row = reading.row.only(CANDIDATE_COLUMNS)
    return parse_candidate_set({**row, "responses": []}, reading.where)


def _read_candidates(reading: Reading) -> CandidateSet | None:
    """A candidate row: `query`, `responses`, and what else it may have."""
    reading.counts.query_formats["raw"] += 1
    return parse_candidate_set(reading.row.only(CANDIDATE_COLUMNS), reading.where)


def _read_scored_prompts(reading: Reading) -> CandidateSet | None:
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
        columns: those that tell it, "a|b" where one of several will do; a row has all of them.
        read: makes a record of a row; None = dropped, counted.
        without: columns with which a row is of another layout.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Reading], CandidateSet | None]
    without: tuple[str, ...] = ()

    def missing_in(self, row: Mapping[str, Any]) -> list[str]:
        """The columns that a row lacks."""
        return [
            names for names in self.columns if not any(name in row for name in names.split("|"))
        ]

    def is_of(self, row: Mapping[str, Any]) -> bool:
        """Whether the columns of a row tell this layout."""
        return not self.missing_in(row) and not any(name in row for name in self.without)


_ANY_PROMPT = "|".join((*PROMPTS, *CONVERSATIONS))

# In this order: a row may have the columns of several, the first one counts.
LAYOUTS: tuple[Layout, ...] = (
    Layout(CANDIDATES, ("query", "responses"), _read_candidates, OTHER_SCORES),
    Layout(
        "numbered preference",
        ("prompt", "response_0", "response_1", "better_response_id"),
        _read_numbered_preference,
    ),
    Layout("preference", ("chosen", "rejected"), _read_preference),
    Layout("scored prompts", ("prompt", "response", "scores"), _read_scored_prompts),
    Layout("replies", (_ANY_PROMPT, "|".join(REPLY_LISTS)), read_reply_list),
    Layout("ranking", (_ANY_PROMPT, "ranking"), read_ranking),
    Layout("reply", ("|".join(PROMPTS[:-1]), "|".join(REPLIES)), _read_reply),
    Layout("query", ("query",), _read_query),
    Layout("messages", ("|".join(CONVERSATIONS),), _read_messages),
    Layout("prompt", ("prompt",), _read_prompt),
    Layout("question", ("question|instruction",), _read_prompt),
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
        if layout.is_of(row) and not (layout.name == CANDIDATES and _holds_objects(row)):
            return layout
    named = ", ".join(f"{name}{near_hint(name, KNOWN)}" for name in row) or "none"
    replies = [name for name in row if name in (*REPLIES, *REPLY_LISTS, "ranking")]
    missing = f"; a column with the prompt is missing next to {replies[0]!r}" if replies else ""
    known = "; ".join(", ".join(layout.columns) for layout in LAYOUTS)
    raise UserError(
        f"{where}: row: its columns ({named}) are none that can be read{missing}; say which is "
        f"which (--columns prompt=YOURS,response=YOURS), or rename them to one of: {known}"
    )


def is_candidate_row(row: Any) -> bool:
    """Whether a file that begins with this row is a candidate file."""
    return isinstance(row, dict) and LAYOUTS[0].is_of(row) and not _holds_objects(row)


def _holds_objects(row: Mapping[str, Any]) -> bool:
    """Whether the replies are objects, which a candidate file does not have."""
    replies = row["responses"]
    return isinstance(replies, list) and any(isinstance(x, (dict, list)) for x in replies)


def _has_reply_list(reading: Reading) -> bool:
    """Whether a list of replies was read, be it empty."""
    row = reading.row
    return any(name in row.read and isinstance(row.get(name), list) for name in REPLY_LISTS)


def read_row(
    layout: Layout, row: Any, where: str, counts: SourceCounts, source: str = ""
) -> CandidateSet | None:
    """One row of a known layout; None where it is dropped.

    Args:
        layout: of the file.
        row: as it stands there.
        where: its place, which begins every message.
        counts: what became of it is counted here.
        source: under which `counts` names the columns that were not read.

    Raises:
        RowError: with a line for each mistake.
    """
    if not isinstance(row, Mapping):
        raise RowError([f"{where}: row: must be an object, is {kind_of(row)}; fix it"])
    counts.read += 1
    if late := not_in_first_row(row, where, layout.without):
        raise RowError(late)
    if missing := layout.missing_in(row):
        raise RowError(
            [
                f"{where}: {column}: is missing (the file's first row has it); every row needs it"
                for column in missing
            ]
        )
    reading = Reading(row, where, counts)
    found = layout.read(reading)
    if found is None:
        return None
    if not (found.candidates or _has_reply_list(reading)) and (
        fault := replies_not_read(reading.row, where)
    ):
        raise RowError([fault])
    if not any(candidate.score is not None for candidate in found.candidates):
        unread = {name: row[name] for name in reading.row.unread}
        if faults := unread_scores(unread, where, len(found.candidates)):
            raise RowError(faults)
    counts.kept += 1
    counts.layouts[layout.name] += 1
    counts.name_unread(source, reading.row.unread)
    return found
