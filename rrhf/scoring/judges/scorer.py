"""Scores responses by a language model that is asked as a judge: `judge:PRESET`.

`rrhf.scoring.judges.presets` says what is asked, and how answers become scores. A response has no
score where an answer that it needs is unparsed, refused or missing; these are counted by reason.
Two equal responses tie without being asked about. Every paid answer is kept in a ledger: a killed
command, or another command with the same question, pays nothing twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rrhf.endpoints.server import require_openai
from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet, plain_prompt, set_id
from rrhf.scoring.config import RewardModelOptions
from rrhf.scoring.judges.presets import PRESETS, RELATIVE
from rrhf.scoring.judges.prompts import own_prompt, question_text
from rrhf.scoring.judges.session import PARSED, Asked, Session
from rrhf.scoring.judges.settings import judge_settings
from rrhf.scoring.scorer import Scorer

logger = logging.getLogger(__name__)

Scores = list[float | None]

_FINGERPRINTED = ("preset", "model", "temperature", "max_tokens", "seed", "structured")

_EXAMPLE = plain_prompt("What is two plus two?", (Candidate("Four."), Candidate("Five.")))


class JudgeScorer(Scorer):
    """Asks a model for its judgement of responses.

    Args:
        name: "judge:PRESET" or "judge:FILE.yaml", and settings after it (`JudgeSettings`).
        options: `scorer_hosts` names the hosts that are allowed.

    Attributes:
        settings: the judge's settings.
        counts: answers by what became of them: "parsed", "unparsed", "refused".

    Raises:
        UserError: a setting does not fit, or the `openai` package is missing. Nothing is sent yet.
    """

    def __init__(self, name: str, options: RewardModelOptions | None = None) -> None:
        hosts = (options or RewardModelOptions()).scorer_hosts
        self.settings = settings = judge_settings(name, hosts)
        require_openai(name.partition("#")[0])
        self._preset = PRESETS[settings.preset]
        self._prompt = self._preset.prompt
        self.name = f"judge:{settings.preset}:{settings.model}"
        if settings.prompt_file:
            self._prompt = own_prompt(settings.prompt_file, self._preset)
            self.name += f":{self._prompt_digest}"
        self.is_relative = settings.preset in RELATIVE
        self.counts: Counter[str] = Counter()
        self._counted: set[str] = set()
        self._session: Session | None = None

    @property
    def _prompt_digest(self) -> str:
        return hashlib.sha256(self._prompt.encode()).hexdigest()[:12]

    # The interface of scorers.

    def probe(self) -> None:
        """Let the judge judge a short made-up example; the answer is kept like any other.

        Raises:
            UserError: the server does not answer.
        """
        self._opened()
        self.close()

    def score(self, sets: Sequence[CandidateSet]) -> list[Scores]:
        """Return the scores, in order; None where the judge's answer is not usable.

        Raises:
            UserError: the server refuses, fails too often, or a limit is reached. What was answered
                is kept.
        """
        judged = {
            "rubric": self._grades,
            "wombat": self._of_lists,
            "pairwise": self._win_shares,
            "listwise": self._of_lists,
        }[self.settings.preset]
        return judged(sets)

    def describe(self) -> dict[str, Any]:
        """Describe the scorer for manifests, with what became of the answers of this process."""
        settings = self.settings
        return super().describe() | {
            "preset": settings.preset,
            "model": settings.model,
            "servers": list(settings.base_url),
            "prompt_sha256": self._prompt_digest,
            "temperature": settings.temperature,
            "answers": dict(self.counts),
            **({} if self._session is None else self._session.describe()),
        }

    def close(self) -> None:
        """Release the ledger, so that another process may write to it."""
        self._session = None

    def verdicts(self, pairs: Sequence[tuple[CandidateSet, str, str]]) -> list[float | None]:
        """Compare two responses to the same prompt, each pair in both orders (`pairwise` only).

        Returns:
            for each pair, 1 = the first is better in both orders, 0 = the second, 1/2 = a tie, also
            where the judge contradicts itself; None = an answer is not usable.
        """
        both = [[(s, (a, b)), (s, (b, a))] if a != b else [] for s, a, b in pairs]
        found = iter(self._judged([one for two in both for one in two]))
        return [_verdict(next(found), next(found)) if two else 0.5 for two in both]

    # What is asked.

    def _grades(self, sets: Sequence[CandidateSet]) -> list[Scores]:
        found = iter(self._judged([(s, (c.response,)) for s in sets for c in s.candidates]))
        grades = (None if one is None else one[0] for one in found)
        return [[next(grades) for _ in s.candidates] for s in sets]

    def _of_lists(self, sets: Sequence[CandidateSet]) -> list[Scores]:
        """Show all different responses to a prompt at once, in an order that the seed decides."""
        least = 2 if self.settings.preset == "listwise" else 1
        orders = [self._order(s) for s in sets]
        asked = [(s, o) for s, o in zip(sets, orders, strict=True) if len(o) >= least]
        answers = iter(self._judged(asked))
        scored: list[Scores] = []
        for s, order in zip(sets, orders, strict=True):
            if len(s.candidates) == 1 < least:
                self._alone(s)
            found = next(answers) if len(order) >= least else None
            if len(s.candidates) > 1 == len(order) < least:
                found = [0.0]  # all are equal
            score_of = dict(zip(order, found or (), strict=False))
            scores = [score_of.get(c.response) for c in s.candidates]
            scored.append(_shares(scores) if self.is_relative else scores)
        return scored

    def _win_shares(self, sets: Sequence[CandidateSet]) -> list[Scores]:
        """Return (wins + ties / 2) / number of other responses; None if a verdict is missing."""
        pairs = [
            (s, a.response, b.response)
            for s in sets
            for a, b in itertools.combinations(s.candidates, 2)
        ]
        verdicts = iter(self.verdicts(pairs))
        scored: list[Scores] = []
        for s in sets:
            count = len(s.candidates)
            won: list[list[float | None]] = [[] for _ in range(count)]
            for first, second in itertools.combinations(range(count), 2):
                verdict = next(verdicts)
                won[first].append(verdict)
                won[second].append(None if verdict is None else 1 - verdict)
            if count == 1:
                self._alone(s)
            scored.append(
                [
                    None if None in one or not one else sum(filter(None, one)) / len(one)
                    for one in won
                ]
            )
        return scored

    def _alone(self, s: CandidateSet) -> None:
        self._count(
            "nothing_to_compare_with", s.id, "the prompt has one response; this judge compares"
        )

    def _order(self, s: CandidateSet) -> tuple[str, ...]:
        """Return the different responses in the order in which they are shown."""
        order = list(dict.fromkeys(c.response for c in s.candidates))
        said = json.dumps([self.settings.seed, s.query, *order])
        random.Random(hashlib.sha256(said.encode()).digest()).shuffle(order)
        return tuple(order)

    # Asking.

    def _judged(self, shown: Iterable[tuple[CandidateSet, tuple[str, ...]]]) -> list[Any]:
        """Return what the judge says about each group of responses; None = not usable."""
        asked = [self._asked(s, responses) for s, responses in shown]
        answers = self._opened().answers(asked) if asked else {}
        found = []
        for one in asked:
            what, value = answers[one.text]
            if one.text not in self._counted:
                self._counted.add(one.text)
                self._count(what, one.prompt, str(value))
            found.append(value if what == PARSED else None)
        return found

    def _asked(self, s: CandidateSet, responses: tuple[str, ...]) -> Asked:
        text = question_text(self._prompt, self._preset, s, responses)
        return Asked(set_id(s.query, s.messages), text, len(responses))

    def _opened(self) -> Session:
        if self._session is None:
            count = 1 if self.settings.preset == "rubric" else 2
            shown = tuple(c.response for c in _EXAMPLE.candidates[:count])
            self._session = Session.opened(self.settings, self._asked(_EXAMPLE, shown))
        return self._session

    def _count(self, what: str, prompt: str, why: str) -> None:
        if what != PARSED and not self.counts[what]:
            logger.warning("%s: %s (first: prompt %s: %s)", self.name, what, prompt, why)
        self.counts[what] += 1


def _shares(scores: Scores) -> Scores:
    """Return for each response (worse ones + equal ones / 2) / number of others; all or none of the
    scores are None."""
    known = [score for score in scores if score is not None]
    return [
        None if a is None else (sum((a > b) + (a == b) / 2 for b in known) - 0.5) / (len(known) - 1)
        for a in scores
    ]


def _verdict(first: str | None, swapped: str | None) -> float | None:
    """Combine the verdicts on (a, b) and on (b, a); disagreement is a tie."""
    if first is None or swapped is None:
        return None
    if (first, swapped) == ("A", "B"):
        return 1.0
    return 0.0 if (first, swapped) == ("B", "A") else 0.5


def judge_fingerprint(name: str) -> str:
    """Return a hash of everything on which a judge's scores depend, except for its server.

    Raises:
        UserError: a setting does not fit.
    """
    settings = judge_settings(name, None)
    prompt = PRESETS[settings.preset].prompt
    if settings.prompt_file:
        prompt = own_prompt(settings.prompt_file, PRESETS[settings.preset])
    parts = [getattr(settings, item) for item in _FINGERPRINTED]
    return hashlib.sha256(json.dumps([prompt, *parts]).encode()).hexdigest()


def no_scorer(name: str) -> NoReturn:
    """Tell what `openai:MODEL` should be.

    Raises:
        UserError: always.
    """
    model = name.partition(":")[2]
    raise UserError(
        f"{name}: a model alone is no scorer; say what it is asked: --scorer "
        f"judge:rubric#model={model} --scorer_hosts api.openai.com, with its key in OPENAI_API_KEY "
        f"(or judge:wombat, judge:pairwise, judge:listwise; another server: "
        f"judge:rubric#model={model}#base_url=http://HOST:PORT/v1)"
    )
