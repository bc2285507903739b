"""Decides, for many questions at once, which request is sent next, and what follows from it.

One thread decides everything. Each request has a thread of its own, which notes the request in the
ledger, sends it, notes the answer, and hands it over. A thread that never ends, because its server
keeps sending parts of a response's head, is left behind.

A request is sent again after a failure that may pass; a random wait grows with each failure, for
the request and for the server. Replies without a usable response may have been paid for, so a
request is sent at most `MALFORMED_TRIES` times if it brings nothing else.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from rrhf.endpoints.budget import Budget, Spent
from rrhf.endpoints.ledger import Ledger
from rrhf.endpoints.limits import MAX_RETRY_AFTER_SECONDS, backoff_seconds
from rrhf.endpoints.questions import Answer, Choice, Question
from rrhf.endpoints.replies import Reply
from rrhf.endpoints.server import Failure, Server
from rrhf.endpoints.settings import EndpointSettings
from rrhf.errors import UserError
from rrhf.progress import pulse

logger = logging.getLogger(__name__)

MALFORMED_TRIES = 3
STOP_SECONDS = 5.0
"""How long a run that a signal stops waits for answers that are on their way."""
_LATE_SECONDS = 2.0  # a request may end this much after its deadline before it is left behind
_POLL_SECONDS = 0.05
_MIN_LATENCIES = 3

KEPT = "answers so far are kept"


@dataclass(eq=False)
class Session:
    """What all calls of a client share.

    Attributes:
        settings: servers and limits.
        servers: the servers.
        ledger: what was asked and answered.
        budget: what was spent.
        at_once: the most responses that a request gets; 0 = not known.
        num_failed: number of requests that failed for good.
    """

    settings: EndpointSettings
    servers: list[Server]
    ledger: Ledger
    budget: Budget
    at_once: int
    num_failed: int = 0


@dataclass(eq=False)
class _Open:
    """A question whose answer is not complete."""

    question: Question
    choices: dict[int, Choice]

    @property
    def missing(self) -> list[int]:
        return [index for index in range(self.question.count) if index not in self.choices]


@dataclass(eq=False)
class _Task:
    """Some responses of a question, to be asked for in one request."""

    of: _Open
    indices: tuple[int, ...]
    num_failures: int = 0
    num_malformed: int = 0
    failed_at: str = ""

    @property
    def bound(self) -> Spent:
        return Spent(1, *self.of.question.most_tokens(len(self.indices)))

    @property
    def is_done(self) -> bool:
        return all(index in self.of.choices for index in self.indices)


@dataclass(eq=False)
class _Attempt:
    """A request that was sent."""

    task: _Task
    server: Server
    started: float
    is_copied: bool = False
    is_lost: bool = False
    outcome: Reply | BaseException | None = None
    cost: Spent | None = None
    seconds: float = field(default=0.0)


class Asking:
    """Asks questions; see `Client.ask`."""

    def __init__(self, session: Session, questions: Iterable[Question]) -> None:
        self._session, self._settings = session, session.settings
        self._ledger, self._budget = session.ledger, session.budget
        self._questions = iter(questions)
        self._ready: deque[_Task] = deque()
        self._later: list[tuple[float, int, _Task]] = []
        self._order = itertools.count()
        self._flying: list[_Attempt] = []
        self._landed: queue.Queue[_Attempt] = queue.Queue()
        self._complete: deque[Answer] = deque()
        self._latencies: deque[float] = deque(maxlen=100)
        self._cap = ""
        self._is_exhausted = False
        self._is_over = False  # then nothing more is written
        self._writing = threading.Lock()

    def run(self) -> Generator[Answer, None, None]:
        """Yield the answers; see `Client.ask`."""
        patience = STOP_SECONDS
        try:
            while True:
                wait = self._send_all()
                while self._complete:
                    yield self._complete.popleft()
                if not (self._flying or self._ready or self._later):
                    if self._is_exhausted:
                        return
                    continue
                if not any(one.task.of.missing for one in self._flying) and self._is_idle:
                    patience = 0.0  # only copies of answered requests are on their way
                    return
                if self._cap and not self._flying:
                    raise self._budget.stop(self._cap, KEPT)
                self._land(wait)
        except UserError:
            if self._flying:
                limit = self._settings.request_timeout_seconds + _LATE_SECONDS
                latest = max(attempt.started for attempt in self._flying)
                patience = latest + limit - time.monotonic()
                logger.warning(
                    "the run ends; it waits up to %g s for the answers of %d requests",
                    patience,
                    len(self._flying),
                )
            raise
        finally:
            self._wait_for_flying(patience)

    @property
    def _is_idle(self) -> bool:
        return self._is_exhausted and not (self._ready or self._later)

    # Sending.

    def _send_all(self) -> float:
        """Send what may be sent now; return the seconds until more may be."""
        wait, self._cap = _POLL_SECONDS, ""
        while True:
            now = time.monotonic()
            while self._later and self._later[0][0] <= now:
                self._ready.append(heapq.heappop(self._later)[2])
            self._fill()
            free = [
                s for s in self._session.servers if s.num_in_flight < self._settings.concurrency
            ]
            if not free:
                return wait
            task = self._ready.popleft() if self._ready else self._straggler(free, now)
            if task is None:
                return wait
            if task.is_done:
                continue
            bound = task.bound
            tokens = bound.input_tokens + bound.output_tokens
            waits = {server: server.wait(tokens, now) for server in free}
            # Another server than the one that failed, if there is one; then the least busy.
            server = min(free, key=lambda s: (waits[s], s.url == task.failed_at, s.num_in_flight))
            self._cap = self._budget.exceeded_by(bound)
            if waits[server] or self._cap:
                self._ready.appendleft(task)
                return wait
            self._send(task, server, bound, tokens, now)

    def _fill(self) -> None:
        """Take questions until there is something to send."""
        while not self._ready and not self._is_exhausted:
            question = next(self._questions, None)
            if question is None:
                self._is_exhausted = True
                return
            opened = _Open(question, self._ledger.known(question))
            if opened.missing:
                self._add_tasks(opened, opened.missing)
            else:
                self._finish(opened)

    def _add_tasks(self, opened: _Open, indices: Sequence[int]) -> None:
        size = self._session.at_once or len(indices)
        for start in range(0, len(indices), size):
            self._ready.append(_Task(opened, tuple(indices[start : start + size])))

    def _straggler(self, free: Sequence[Server], now: float) -> _Task | None:
        """Return a copy of a request that takes much longer than others, for another server."""
        factor = self._settings.straggler_factor
        is_alone = len(self._session.servers) == 1
        if is_alone or not factor or len(self._latencies) < _MIN_LATENCIES:
            return None
        limit = factor * statistics.median(self._latencies)
        for attempt in self._flying:
            is_late = now - attempt.started > limit and not attempt.is_copied
            bound = attempt.task.bound
            tokens = bound.input_tokens + bound.output_tokens
            is_free = any(s is not attempt.server and not s.wait(tokens, now) for s in free)
            if is_late and is_free and not self._budget.exceeded_by(bound):
                attempt.is_copied = True
                return replace(attempt.task, failed_at=attempt.server.url)
        return None

    def _send(self, task: _Task, server: Server, bound: Spent, tokens: int, now: float) -> None:
        self._budget.reserve(bound)
        server.requests.take(1, now)
        server.tokens.take(tokens, now)
        server.num_in_flight += 1
        attempt = _Attempt(task, server, now)
        self._flying.append(attempt)
        threading.Thread(target=self._attempt, args=(attempt, bound), daemon=True).start()

    def _attempt(self, attempt: _Attempt, bound: Spent) -> None:
        """Send one request and note its answer; runs in the request's thread."""
        task, question = attempt.task, attempt.task.of.question
        try:
            with self._writing:
                if self._is_over:
                    return
                number = self._ledger.send(bound)
            try:
                reply = attempt.server.ask(question, task.indices[0], len(task.indices))
            except Failure as failure:
                attempt.outcome = failure
                attempt.cost = Spent(1) if failure.is_free else None
                if failure.kind == "refused":
                    attempt.outcome = _as_reply(failure, question, attempt.server, task.indices)
            else:
                reply = replace(reply, choices=reply.choices[: len(task.indices)])
                attempt.outcome = reply
                if reply.usage is not None:
                    attempt.cost = Spent(1, reply.usage.input_tokens, reply.usage.output_tokens)
            with self._writing:
                if self._is_over:
                    return
                if isinstance(attempt.outcome, Reply):
                    cost = attempt.cost or bound
                    used = task.indices[: len(attempt.outcome.choices)]
                    self._ledger.answer(number, question, used, attempt.outcome, cost)
                else:
                    self._ledger.close(number, attempt.cost)
        except BaseException as error:  # raised again by the thread that waits
            attempt.outcome = error
        attempt.seconds = time.monotonic() - attempt.started
        self._landed.put(attempt)

    # Receiving.

    def _land(self, wait: float) -> None:
        """Handle the next outcome, if one comes in time."""
        now = time.monotonic()
        limit = self._settings.request_timeout_seconds + _LATE_SECONDS
        for attempt in [one for one in self._flying if now - one.started > limit]:
            attempt.is_lost = True
            self._release(attempt)
            self._retry(attempt, Failure("failed", attempt.server.url, "sends without end"))
        try:
            attempt = self._landed.get(timeout=wait)
        except queue.Empty:
            pulse(self._state())
            return
        if attempt.is_lost:
            return
        self._release(attempt)
        outcome, server = attempt.outcome, attempt.server
        is_unreachable = isinstance(outcome, Failure) and outcome.kind == "unreachable"
        server.is_there = bool(server.is_there) or not is_unreachable
        if isinstance(outcome, Reply):
            self._take(attempt, outcome)
        elif isinstance(outcome, Failure):
            self._retry(attempt, outcome)
        else:
            assert outcome is not None, "a request that landed has an outcome"
            raise outcome

    def _release(self, attempt: _Attempt) -> None:
        attempt.server.num_in_flight -= 1
        self._flying.remove(attempt)
        bound = attempt.task.bound
        self._budget.settle(bound, attempt.cost or bound)

    def _take(self, attempt: _Attempt, reply: Reply) -> None:
        """Store the choices of a reply; ask again for those that are missing."""
        attempt.server.pauses.answered()
        self._latencies.append(attempt.seconds)
        task = attempt.task
        if task.is_done:
            return  # another server was faster
        for index, choice in zip(task.indices, reply.choices, strict=False):
            task.of.choices.setdefault(index, choice)
        if rest := task.indices[len(reply.choices) :]:
            self._session.at_once = len(reply.choices)
            self._add_tasks(task.of, [i for i in rest if i not in task.of.choices])
        if not task.of.missing:
            self._finish(task.of)

    def _finish(self, opened: _Open) -> None:
        choices = tuple(opened.choices[index] for index in range(opened.question.count))
        self._complete.append(Answer(opened.question, choices))

    def _retry(self, attempt: _Attempt, failure: Failure) -> None:
        """Decide what follows from a failure.

        Raises:
            UserError: nothing more may be tried.
        """
        task, server, now = attempt.task, attempt.server, time.monotonic()
        wait = failure.wait_seconds
        if failure.kind in ("busy", "unreachable"):
            server.pauses.failed(now, wait)
        if task.is_done or any(
            one.task.of is task.of and one.task.indices == task.indices for one in self._flying
        ):
            return  # a copy of the request is answered, or on its way
        task.num_failures += 1
        task.num_malformed += failure.kind == "malformed"
        task.failed_at = server.url
        if all(one.is_there is False for one in self._session.servers):
            raise UserError(f"{failure}; start the server, or correct --base_url")
        if failure.kind == "wrong" or (wait or 0) > MAX_RETRY_AFTER_SECONDS:
            asks = f"; it asks to wait {wait:.0f} s" if wait else ""
            raise UserError(f"{failure}{asks}; {KEPT}, and the same command continues") from failure
        if task.num_failures > self._settings.max_retries or task.num_malformed >= MALFORMED_TRIES:
            self._give_up(task, failure)
            return
        logger.warning("%s; trying again", failure)
        pause = wait or 0.0
        if failure.kind != "busy" or wait is None:
            first = self._settings.retry_wait_seconds
            pause = max(pause, backoff_seconds(first, task.num_failures))
        heapq.heappush(self._later, (now + pause, next(self._order), task))

    def _give_up(self, task: _Task, failure: Failure) -> None:
        """Record a request that failed for good.

        Raises:
            UserError: more requests failed than `max_failed_requests` allows.
        """
        self._session.num_failed += 1
        where = f"prompt {task.of.question.id} ({task.num_failures} requests)"
        allowed = self._settings.max_failed_requests
        if self._session.num_failed > allowed:
            raise UserError(
                f"{failure}; {where}; {KEPT}, and the same command continues; to go on without "
                f"prompts that fail, raise --max_failed_requests above {allowed}"
            )
        logger.warning("%s; %s is recorded as failed", failure, where)
        for index in task.indices:
            failed = Choice("", failure=f"failed: {failure}", server=task.failed_at)
            task.of.choices.setdefault(index, failed)
        if not task.of.missing:
            self._finish(task.of)

    def _state(self) -> str:
        waiting = f", {len(self._later)} to be repeated" if self._later else ""
        return f"{len(self._flying)} requests on their way{waiting}"

    def _wait_for_flying(self, patience: float) -> None:
        """Give answers that are on their way so many seconds to reach the ledger."""
        until = time.monotonic() + patience
        try:
            while self._flying and time.monotonic() < until:
                with suppress(queue.Empty):
                    attempt = self._landed.get(timeout=_POLL_SECONDS)
                    if not attempt.is_lost:
                        self._release(attempt)
        finally:  # a signal may end the wait
            with self._writing:
                self._is_over = True
        for attempt in list(self._flying):
            self._release(attempt)


def _as_reply(
    failure: Failure, question: Question, server: Server, indices: Sequence[int]
) -> Reply:
    """Return a refusal of the server as the outcome of every response that was asked for."""
    choice = Choice("", failure=failure.reason, model=question.model, server=server.url)
    return Reply([choice] * len(indices), None)
