"""Asks servers many questions at once, within limits.

It says first what will be sent and what that may cost, yields the answers as they are complete, and
knows what was spent. `rrhf.endpoints.asking` does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Sequence

from rrhf.endpoints.asking import Asking, Session
from rrhf.endpoints.budget import Budget, Spent
from rrhf.endpoints.ledger import Journal, Ledger
from rrhf.endpoints.questions import BYTES_PER_TOKEN, Answer, Question
from rrhf.endpoints.secrets import Secrets, read_keys
from rrhf.endpoints.server import Server
from rrhf.endpoints.settings import EndpointSettings
from rrhf.errors import NothingSent

logger = logging.getLogger(__name__)


class Client:
    """Asks the servers of its settings.

    Args:
        settings: servers and limits.
        journal: keeps what was asked and answered; None = nothing is kept.

    Keys are read when something is about to be sent.
    """

    def __init__(self, settings: EndpointSettings, journal: Journal | None = None) -> None:
        ledger, budget = Ledger(journal), Budget(settings)
        budget.spent.add(ledger.spent)
        most = settings.max_samples_per_request
        self._session = Session(settings, [], ledger, budget, most)

    def _connect(self) -> None:
        """Make the servers, if this is the first time that something is sent."""
        session, settings = self._session, self._session.settings
        if not session.servers:
            keys = read_keys(settings)
            secrets = Secrets(keys)
            for url, key in zip(settings.base_url, keys, strict=True):
                session.servers.append(Server(url, key, settings, secrets))

    def announce(self, questions: Sequence[Question], sends: str) -> None:
        """Say what will be sent where, and the most that it can cost; call it before `ask`.

        Args:
            questions: all that will be asked.
            sends: what leaves this machine, in words, such as "the messages of 12 prompts".

        Raises:
            NothingSent: this is a dry run; the message is its result.
            UserError: a key or the `openai` package is missing.
        """
        settings = self._session.settings
        counts = [q.count - self._session.ledger.num_known(q) for q in questions]
        left = [(q, count) for q, count in zip(questions, counts, strict=True) if count]
        requests = sum(counts)
        tokens = [
            sum(q.estimated_prompt_tokens * n for q, n in each)
            for each in ([(q, 1) for q, _ in left], left)
        ]
        output_tokens = sum(q.max_tokens * n for q, n in left)
        said = (
            f"{sends} to {' and '.join(settings.base_url)}, model "
            f"{', '.join(dict.fromkeys(q.model for q in questions))}: "
            f"{_range(len(left), requests)} requests, about {_range(*tokens)} tokens of prompts "
            f"(estimated as one for {BYTES_PER_TOKEN} bytes), at most {output_tokens:,} tokens of "
            "responses"
        )
        if cost := settings.cost(tokens[1], output_tokens):
            said += f", cost at most about {cost:.4f}"
        for server, count in self._session.ledger.servers().items():
            logger.info("%d responses of %s were paid for before, and are used", count, server)
        most = Spent(requests, tokens[1], output_tokens)
        if cap := self._session.budget.exceeded_by(most):
            logger.warning("%s may end the run before every prompt is answered", cap)
        if settings.dry_run:
            raise NothingSent(f"dry run, nothing was sent; the command would send {said}")
        if requests:
            self._connect()
            logger.info("sending %s", said)

    def usage(self) -> dict[str, float]:
        """Return requests, tokens and cost so far, those of earlier runs included."""
        return self._session.budget.as_dict()

    def close(self) -> None:
        for server in self._session.servers:
            server.close()

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        """Yield the answer of each question once all its choices are there.

        Choices that brought no response say why (`Choice.failure`).

        Raises:
            UserError: a key is missing, a cap is reached, a server refuses every request, or a
                request failed too often; everything that was answered is in the journal.
        """
        self._connect()
        return Asking(self._session, questions).run()


def _range(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"
