"""The ledger: every request that was sent, and every answer that was paid for.

A request is noted before it is sent, with the most that it can cost, and its answer before it is
used. A killed run thus loses no answer, asks nothing twice that was answered, and knows what it
spent. Where the rows are kept is up to the caller (`Journal`).
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

from rrhf.endpoints.budget import Spent
from rrhf.endpoints.questions import Choice, Question
from rrhf.endpoints.replies import Reply, read_choice


class Journal(Protocol):
    """A file to which rows are appended, each written when `append` returns."""

    def rows(self) -> Iterable[dict[str, Any]]:
        """Return the rows of earlier runs."""

    def append(self, value: dict[str, Any]) -> None:
        """Write a row."""


class Ledger:
    """Keeps requests and answers in a journal; safe to use from several threads.

    Args:
        journal: keeps the rows; None = they are kept nowhere, for questions that are cheap to ask
            again.

    Attributes:
        spent: what the requests of earlier runs cost; the most possible, for those without answer.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal
        self._lock = threading.Lock()
        self._answers: dict[str, dict[int, dict[str, Any]]] = {}
        self.spent = Spent()
        self._num_sent = 0
        sent: dict[int, Spent] = {}
        for row in journal.rows() if journal else ():
            number = row["request"]
            self._num_sent = max(self._num_sent, number + 1)
            if "sent" in row:
                sent[number] = Spent(1, *row["sent"])
            else:
                sent.setdefault(number, Spent(1))  # its row may be damaged
                if row["cost"] is not None:
                    sent[number] = Spent(1, *row["cost"])
                self._note(row)
        for cost in sent.values():
            self.spent.add(cost)

    def _note(self, row: dict[str, Any]) -> None:
        if "choices" in row:
            kept = self._answers.setdefault(row["question"], {})
            for index, choice in zip(row["indices"], row["choices"], strict=True):
                kept.setdefault(index, {**choice, "model": row["model"], "server": row["server"]})

    def servers(self) -> dict[str, int]:
        """Return the number of answers of earlier runs, by server."""
        found = (one["server"] for kept in self._answers.values() for one in kept.values())
        return dict(Counter(found))

    def num_known(self, question: Question) -> int:
        """Return the number of choices of a question that earlier runs paid for."""
        kept = self._answers.get(question.key, {})
        return sum(index < question.count for index in kept)

    def known(self, question: Question) -> dict[int, Choice]:
        """Return the choices of a question that earlier runs paid for, by index."""
        kept = self._answers.pop(question.key, {})
        return {
            index: _choice(row, question) for index, row in kept.items() if index < question.count
        }

    def send(self, request: Spent) -> int:
        """Note a request that is about to be sent; return its number."""
        with self._lock:
            number = self._num_sent
            self._num_sent += 1
            self._append({"request": number, "sent": [request.input_tokens, request.output_tokens]})
        return number

    def close(self, number: int, cost: Spent | None) -> None:
        """Note the end of a request without answer, and its cost; None = it may have cost the
        most."""
        with self._lock:
            self._append({"request": number, "cost": _tokens(cost)})

    def answer(
        self, number: int, question: Question, indices: Iterable[int], reply: Reply, cost: Spent
    ) -> None:
        """Note the choices of a request for the given indices, and what it cost."""
        row = {
            "request": number,
            "cost": _tokens(cost),
            "question": question.key,
            "prompt": question.id,
            "indices": list(indices),
            "server": reply.choices[0].server,
            "model": reply.choices[0].model,
            "choices": [
                {"data": one.data, "failure": one.failure, "tokens": one.num_tokens}
                for one in reply.choices
            ],
        }
        with self._lock:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.append(row)


def _tokens(cost: Spent | None) -> list[int] | None:
    return None if cost is None else [cost.input_tokens, cost.output_tokens]


def _choice(row: dict[str, Any], question: Question) -> Choice:
    if not row["data"]:  # the server refused the request itself
        return Choice("", failure=row["failure"], model=row["model"], server=row["server"])
    return read_choice(row["data"], question.api, row["model"], row["server"], row["tokens"])
