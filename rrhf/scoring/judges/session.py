"""Asks a judge's server, and keeps what it answered.

The scorers of one process that name the same judge share a session, and so its ledger: a question
that one of them asked is answered for all. A session is closed when its last scorer is gone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from rrhf.endpoints.client import Client
from rrhf.endpoints.questions import Choice, Question
from rrhf.endpoints.server import Failure
from rrhf.endpoints.settings import host_of
from rrhf.errors import UserError
from rrhf.process_end import launched_place
from rrhf.scoring.judges.presets import PRESETS, Unparsed
from rrhf.scoring.judges.settings import JudgeSettings, as_settings
from rrhf.stages.journal import JournalFile

logger = logging.getLogger(__name__)

PARSED, UNPARSED, REFUSED = "parsed", "unparsed", "refused"

_FOLDER = "judge_answers"
_EXAMPLE_RETRIES = 2
"""A server that is away is found out about in seconds, before anything else is done."""


@dataclass(frozen=True)
class Asked:
    """A question to the judge.

    Attributes:
        prompt: id of the prompt.
        text: the whole question.
        count: number of responses that it shows.
    """

    prompt: str
    text: str
    count: int


class Session:
    """A judge that can be asked.

    Args:
        settings: the judge's settings.
        example: a made-up question, by which is found out whether the server answers, and whether
            it can force the answer's form. Its answer is kept like any other.

    Raises:
        UserError: the server does not answer, or the ledger cannot be written.
    """

    _open: ClassVar[weakref.WeakValueDictionary[str, Session]] = weakref.WeakValueDictionary()

    @classmethod
    def opened(cls, settings: JudgeSettings, example: Asked) -> Session:
        """Return the session of these settings, a new one if there is none."""
        key = json.dumps([asdict(settings), str(Path.cwd()), example.text])
        found = cls._open.get(key)
        if found is None:
            found = cls._open[key] = cls(settings, example)
        return found

    def __init__(self, settings: JudgeSettings, example: Asked) -> None:
        self._settings = settings
        self._preset = PRESETS[settings.preset]
        self._known: dict[str, tuple[str, Any]] = {}
        self._is_structured = settings.structured != "off"
        path = ledger_path(settings)
        journal = JournalFile(path)
        close = weakref.finalize(self, _close, journal, not settings.ledger)
        try:
            with _told_as_settings():
                path.parent.mkdir(parents=True, exist_ok=True)
                retries = min(settings.max_retries, _EXAMPLE_RETRIES)
                self._client = Client(replace(settings, max_retries=retries), journal)
                self._try(example)
                self._client.close()
                journal.close()
                self._client = Client(settings, journal)
        except BaseException:
            close()
            raise
        logger.info("%s: the answers of %s are kept there", path, settings.model)

    def describe(self) -> dict[str, Any]:
        """Return how the judge was asked, and what it cost, for manifests."""
        return {"structured": self._is_structured, "usage": self._client.usage()}

    def _try(self, example: Asked) -> None:
        """Ask the example, without `response_format` if the server refuses it.

        Raises:
            UserError: the server does not answer.
        """
        try:
            self.answers([example])
        except UserError as error:
            refused = error.__cause__
            is_refusal = isinstance(refused, Failure) and refused.kind == "wrong"
            if self._settings.structured != "auto" or not is_refusal:
                raise
            self._is_structured = False
            self.answers([example])
            logger.warning(
                "%s: the server refuses response_format json_schema (%s), so the form of answers "
                "is only asked for in words",
                self._settings.model,
                refused,
            )

    def answers(self, asked: Iterable[Asked]) -> dict[str, tuple[str, Any]]:
        """Ask what is not known yet; return all answers so far.

        Returns:
            a question's text -> what became of its answer, and what the answer says, or else why it
            says nothing.

        Raises:
            UserError: the server refuses, fails too often, or a limit is reached.
        """
        left = {one.text: one for one in asked if one.text not in self._known}
        questions = [self._question(one) for one in left.values()]
        by_key = {q.key: one for q, one in zip(questions, left.values(), strict=True)}
        with _told_as_settings():
            for answer in self._client.ask(questions):
                one = by_key[answer.question.key]
                self._known[one.text] = self._read(answer.choices[0], one)
        return self._known

    def _question(self, one: Asked) -> Question:
        settings = self._settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [{"role": "user", "content": one.text}],
            "temperature": settings.temperature,
            settings.max_tokens_field: settings.max_tokens,
        }
        if self._is_structured:
            schema = self._preset.schema(one.count)
            form = {"name": "verdict", "strict": True, "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return Question(one.prompt, body, 1, settings.max_tokens)

    def _read(self, choice: Choice, one: Asked) -> tuple[str, Any]:
        if choice.failure:
            return REFUSED, choice.failure
        try:
            return PARSED, self._preset.parse(choice.text, one.count)
        except Unparsed as error:
            cut = " (cut off at #max_tokens)" if choice.finish_reason == "length" else ""
            return UNPARSED, f"the answer {error}{cut}: {choice.text!r:.200}"


def ledger_path(settings: JudgeSettings) -> Path:
    """Return the file of paid answers; each process of several has its own.

    The port of a server is not part of its name, since a server may restart at another one.
    """
    model = "".join(c if c.isalnum() or c in "-_." else "_" for c in settings.model)
    parts = [*map(host_of, settings.base_url), settings.prompt_file]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:6]
    path = Path(settings.ledger or f"{_FOLDER}/{settings.preset}-{model}-{digest}.jsonl")
    rank = launched_place()[0]
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}") if rank else path


def _close(journal: JournalFile, is_ours: bool) -> None:
    journal.close()
    if is_ours:
        with suppress(OSError):  # it is not empty, or not there
            journal.path.parent.rmdir()


@contextmanager
def _told_as_settings() -> Iterator[None]:
    """Context manager: name settings as a judge has them, not as flags, in messages."""
    try:
        yield
    except UserError as error:
        said = as_settings(str(error))
        if "another process is writing" in said:
            said += ": #ledger=FILE in the judge's name"
        raise UserError(said) from error.__cause__
