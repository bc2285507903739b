"""The candidate set, the record that all stages exchange: a prompt and its responses.

A bare prompt is a set without candidates, a demonstration a set with one candidate, a preference
pair a set with two, and a ranked group a set with any number. Stages read sets through views
(`rrhf.data.views`); on disk a set is a row of a candidate file (`rrhf.data.candidate_files`).
Standard library only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

FinishReason = Literal["stop", "length", "unknown"]
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "unknown")
ROLES = ("system", "user", "assistant")

CHOSEN_SOURCE = "human:chosen"
REJECTED_SOURCE = "human:rejected"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `content` is what was said, without any template around it."""

    role: str
    content: str


@dataclass(frozen=True)
class Candidate:
    """A response as text, with its source and score.

    Attributes:
        response: the text. If the set has `messages`, this is the content of the reply, without
            the space or newline that a chat format puts before a reply; otherwise it is used
            unchanged.
        source: the author: "policy:<name>", "teacher:<model>", "human:chosen"; "" if unknown.
        score: the score that a scorer gave; None = not scored; never NaN.
        finish_reason: "stop" = the response is complete; "length" = cut at the maximum length
            (no EOS is appended in training); "unknown" = treated as complete.
    """

    response: str
    source: str = ""
    score: float | None = None
    finish_reason: FinishReason = "unknown"


class Columns(NamedTuple):
    """The messages and candidates of a set as a row holds them, checked but not made yet.

    Attributes:
        roles, contents: the turns of `messages`; None if the set has none.
        responses: the responses.
        sources, scores, finish_reasons: an entry for each response; None or empty = the default.
    """

    roles: Sequence[str] | None
    contents: Sequence[str]
    responses: Sequence[str]
    sources: Sequence[str] | None
    scores: Sequence[float | None] | None
    finish_reasons: Sequence[FinishReason] | None

    def messages(self) -> tuple[Message, ...] | None:
        return None if self.roles is None else tuple(map(Message, self.roles, self.contents))

    def candidates(self) -> tuple[Candidate, ...]:
        sources = self.sources or repeat("")
        scores = self.scores or repeat(None)
        reasons: Iterable[FinishReason] = self.finish_reasons or repeat("unknown")
        return tuple(map(Candidate, self.responses, sources, scores, reasons))


@dataclass(frozen=True)
class CandidateSet:
    """A prompt and its candidates.

    Attributes:
        id: see `set_id`; unique within a file.
        query: the prompt as plain text.
        messages: the conversation that the query was made from (the last turn is the user's), or
            None if only the text is known; the text is then used unchanged.
        candidates: any number of candidates; prompts may have different numbers.
        origin: the source of the prompt, such as "hh-rlhf/harmless-base".
    """

    id: str
    query: str
    # A default of these two would be found where `__getattr__` has to make the value.
    messages: tuple[Message, ...] | None = field(default_factory=type(None))
    candidates: tuple[Candidate, ...] = field(default_factory=tuple)
    origin: str = ""

    _columns: ClassVar[Columns | None] = None

    if not TYPE_CHECKING:  # or a type checker would accept any misspelt attribute

        def __getattr__(self, name: str) -> Any:
            """Make what `set_of_columns` left out, when it is first read."""
            if name == "id":
                found = set_id(self.query, self.messages)
            elif name in ("messages", "candidates") and self._columns is not None:
                found = getattr(self._columns, name)()
            else:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            object.__setattr__(self, name, found)
            return found

    @property
    def responses(self) -> Sequence[str]:
        """The texts of the candidates."""
        if self._columns is not None:
            return self._columns.responses
        return [candidate.response for candidate in self.candidates]

    @property
    def scores(self) -> tuple[float | None, ...]:
        return tuple([candidate.score for candidate in self.candidates])

    @property
    def conversation(self) -> list[dict[str, str]] | None:
        """The messages as new dictionaries {"role", "content"}; None if the set has none."""
        if self._columns is not None:
            roles, contents = self._columns.roles, self._columns.contents
        elif self.messages is not None:
            roles, contents = [m.role for m in self.messages], [m.content for m in self.messages]
        else:
            roles = None
        if roles is None:
            return None
        return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]

    @property
    def is_plain(self) -> bool:
        """Whether the prompt is plain text: `messages` holds one user turn that equals `query`.

        A model with a chat template gets the text as the user's turn, any other model unchanged.
        """
        return _is_plain(self.query, self.messages)


def set_of_columns(query: str, columns: Columns, origin: str, own_id: str) -> CandidateSet:
    """Make a set whose messages and candidates are made when first read: few readers need both.

    Args:
        query, origin: see `CandidateSet`.
        columns: the messages and candidates.
        own_id: the id; "" = computed from the prompt when first read.
    """
    record = object.__new__(CandidateSet)
    assign = object.__setattr__  # as the constructor of a frozen class does
    assign(record, "query", query)
    assign(record, "origin", origin)
    assign(record, "_columns", columns)
    if own_id:
        assign(record, "id", own_id)
    return record


def plain_prompt(text: str, candidates: tuple[Candidate, ...] = ()) -> CandidateSet:
    """Make a candidate set whose prompt is plain text; see `CandidateSet.is_plain`."""
    return CandidateSet(set_id(text), text, (Message("user", text),), candidates)


def _is_plain(query: str, messages: tuple[Message, ...] | None) -> bool:
    if messages is None or len(messages) != 1:
        return False
    return messages[0].role == "user" and messages[0].content == query


def set_id(query: str, messages: tuple[Message, ...] | None = None, occurrence: int = 0) -> str:
    """Return a stable id of a prompt: 16 hex digits of SHA-256 over its messages, or over its text.

    Args:
        query: the prompt as text.
        messages: the conversation, if known; the id is then computed from it and does not depend on
            the chat format. A plain prompt gets the id of its text.
        occurrence: how often the same prompt came earlier in the file; if not zero, appended as
            "-1", "-2", ...
    """
    is_text = messages is None or _is_plain(query, messages)
    if is_text:
        said = encode_basestring_ascii(query)
    else:
        quoted = encode_basestring_ascii
        turns = [f"[{quoted(m.role)}, {quoted(m.content)}]" for m in messages or ()]
        said = f"[{', '.join(turns)}]"  # as `json.dumps` writes it
    digest = hashlib.sha256(said.encode("ascii")).hexdigest()[:16]
    return digest if occurrence == 0 else f"{digest}-{occurrence}"
