"""Scores responses by a server: `http://HOST:PORT/PATH`, `https://...`.

The server is `rrhf serve-reward`, a remote reward model of OpenRLHF (`#form=openrlhf`), or anything
that answers as `rrhf.scoring.http.wire` describes. What it cannot score is null, and counts as
unscored as in any other scorer; an answer of another form, or none at all, stops the command, and
is never a score. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from rrhf.errors import UserError
from rrhf.ranges import COUNT, POSITIVE, Ranged
from rrhf.records import Candidate, CandidateSet, plain_prompt
from rrhf.scoring.config import RewardModelOptions
from rrhf.scoring.http.addresses import Resolver, parse_address
from rrhf.scoring.http.client import JsonClient
from rrhf.scoring.http.wire import Form, Malformed, Scored, decode_answer, encode_request
from rrhf.scoring.scorer import Scorer
from rrhf.scoring.settings_in_names import made_settings, split_settings

_PROBE_SECONDS = 30.0
_BASE_BYTES, _BYTES_PER_SCORE = 1 << 20, 1 << 10


@dataclass
class HttpScorerSettings(Ranged):
    """The settings of a scorer behind HTTP; each may follow its URL as #NAME=VALUE."""

    form: Form = "sets"
    """How requests and answers look: sets (`rrhf serve-reward`), or openrlhf."""

    token_env: str = ""
    """Environment variable with the token that the server wants; empty = no token."""

    timeout_seconds: float = 600.0
    """Time for one request, with all its repetitions."""

    sets_per_request: int = 256
    """Maximum number of prompts in a request."""

    megabytes_per_request: float = 8.0
    """Maximum size of a request; more prompts are sent in several ones."""

    is_relative: bool = False
    """Whether the server's scores only compare the responses to one prompt, as those of
    judge:pairwise do."""

    RANGES: ClassVar = {
        "timeout_seconds": POSITIVE,
        "sets_per_request": COUNT,
        "megabytes_per_request": POSITIVE,
    }


class HttpScorer(Scorer):
    """Asks a server for scores.

    Args:
        name: the URL, with settings after it.
        options: `scorer_hosts` names the hosts that are allowed.
        resolver: finds the host's addresses; None = as the system does.

    Raises:
        UserError: the URL is malformed, its host not allowed, or a setting does not fit. Nothing is
            sent yet.
    """

    def __init__(
        self,
        name: str,
        options: RewardModelOptions | None = None,
        resolver: Resolver | None = None,
    ) -> None:
        url, given = split_settings(name)
        address = parse_address(url, (options or RewardModelOptions()).scorer_hosts)
        self.settings = made_settings(HttpScorerSettings, given, name)
        self.name, self.is_relative = url, self.settings.is_relative
        self._client = JsonClient(address, self.settings.token_env, resolver)
        self._too_long: set[tuple[str, str]] = set()

    def probe(self) -> None:
        """Let the server score a short made-up response.

        Raises:
            UserError: it does not answer, or not as it should.
        """
        s = plain_prompt("What is two plus two?", (Candidate("Four.", finish_reason="stop"),))
        self._asked([s], min(_PROBE_SECONDS, self.settings.timeout_seconds), retries=False)

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Return the scores, in order; None where the server says null.

        Raises:
            UserError: the server does not answer, or not as it should.
        """
        found: list[list[float | None]] = []
        for part in self._parts(sets):
            scored = self._asked(part, self.settings.timeout_seconds)
            for s, flags in zip(part, scored.too_long, strict=True):
                both = zip(s.candidates, flags, strict=True)
                self._too_long |= {(s.query, c.response) for c, is_too_long in both if is_too_long}
            found += scored.scores
        return found

    def describe(self) -> dict[str, Any]:
        """Describe the scorer for manifests."""
        settings = {
            key: value for key, value in asdict(self.settings).items() if key != "token_env"
        }
        return super().describe() | {"settings": settings}

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        """Whether the server did not say that the response exceeds its scorer's window."""
        return (s.query, candidate.response) not in self._too_long

    def _parts(self, sets: Sequence[CandidateSet]) -> Iterator[list[CandidateSet]]:
        """Divide the sets into requests of limited number and size, one set at least each."""
        part: list[CandidateSet] = []
        size, limit = 0, self.settings.megabytes_per_request * 1e6
        for s in sets:
            own = len(json.dumps(encode_request(self.settings.form, [s])))
            if part and (size + own > limit or len(part) == self.settings.sets_per_request):
                yield part
                part, size = [], 0
            part.append(s)
            size += own
        if part:
            yield part

    def _asked(self, sets: Sequence[CandidateSet], seconds: float, retries: bool = True) -> Scored:
        form, count = self.settings.form, sum(len(s.candidates) for s in sets)
        most = _BASE_BYTES + _BYTES_PER_SCORE * count
        answer = self._client.post(encode_request(form, sets), most, seconds, retries)
        try:
            return decode_answer(form, answer, sets)
        except Malformed as error:
            raise UserError(
                f"{self.name}: {error}; the server must answer in the form {form}"
            ) from None
