"""A judge that a test decides: it reads a question of `rrhf.scoring.judges`, and answers it."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scripted_server import ScriptedServer, prompt_of

from rrhf.endpoints.questions import Answer, Choice, Question

_SHOWN = re.compile(r"<(conversation|reply)-([0-9a-f]{16})>\n(.*?)\n</\1-\2>", re.DOTALL)
CRITERIA = ("relevance", "correctness", "coherence", "safety")

Worth = Callable[[str, str], float]
"""Takes the conversation and a reply as shown; returns the reply's worth."""


def shown(question: str) -> tuple[str, list[str]]:
    """The conversation and the replies of a question, in the order shown."""
    found = [(kind, text) for kind, _, text in _SHOWN.findall(question)]
    texts = [text for kind, text in found if kind == "reply"]
    return next(text for kind, text in found if kind == "conversation"), texts


def preset_of(question: str) -> str:
    for preset, words in (
        ("pairwise", '"better"'),
        ("listwise", '"ranking"'),
        ("wombat", '"ratings"'),
    ):
        if words in question:
            return preset
    return "rubric"


def answer_of(question: str, worth: Worth) -> dict[str, Any]:
    """The right answer; for grades, `worth` is a whole number in their range."""
    conversation, replies = shown(question)
    worths = [worth(conversation, reply) for reply in replies]
    preset = preset_of(question)
    if preset == "rubric":
        return dict.fromkeys(CRITERIA, worths[0])
    if preset == "wombat":
        rows = [{"response": n, **dict.fromkeys(CRITERIA, w)} for n, w in enumerate(worths, 1)]
        return {"reasoning": "because", "ratings": rows[::-1]}
    if preset == "listwise":
        order = sorted(range(len(worths)), key=lambda place: -worths[place])
        return {"ranking": [place + 1 for place in order]}
    a, b = worths
    return {"better": "tie" if a == b else "A" if a > b else "B"}


def judge(worth: Worth, **server: Any) -> ScriptedServer:
    """A judge that is always right."""
    return ScriptedServer(
        answer=lambda body, number: json.dumps(answer_of(prompt_of(body), worth)), **server
    )


def answering(*answers: Any, **server: Any) -> ScriptedServer:
    """A judge that answers what it is told to, whatever it is asked; the last answer repeats."""
    left = list(answers)

    def answer(body: dict[str, Any], number: int) -> str:
        one = left.pop(0) if len(left) > 1 else left[0]
        return one if isinstance(one, str) else json.dumps(one)

    return ScriptedServer(answer=answer, **server)


def imperfect(
    worth: Worth,
    sensitivity: float,
    specificity: float,
    first: float,
    is_ours: Callable[[str, str], bool],
) -> ScriptedServer:
    """A pairwise judge of known mistakes, with a preference for the reply that is shown first.

    Of the pairs in which our reply is truly better, a share `sensitivity` is judged rightly, of the
    others `specificity`; the same in both orders. Besides, in a share `first` of all pairs it says
    A whatever is shown, so that both orders contradict each other.
    """

    def answer(body: dict[str, Any], number: int) -> str:
        conversation, replies = shown(prompt_of(body))
        draws = random.Random(json.dumps([conversation, *sorted(replies)]))
        by_position, mistake = draws.random() < first, draws.random()
        if by_position:
            return json.dumps({"better": "A"})
        ours, theirs = replies if is_ours(conversation, replies[0]) else replies[::-1]
        is_better = worth(conversation, ours) > worth(conversation, theirs)
        says_ours = (mistake < sensitivity) if is_better else (mistake >= specificity)
        return json.dumps({"better": "A" if (replies[0] is ours) == says_ours else "B"})

    return ScriptedServer(answer=answer)


class Unwired:
    """Takes the place of `rrhf.endpoints.client.Client`, and asks a judge without a network.

    Args:
        judge: what answers.
    """

    def __init__(self, judge: ScriptedServer) -> None:
        self._judge = judge

    def __call__(self, settings: Any, journal: Any) -> Unwired:
        return self

    def ask(self, questions: Sequence[Question]) -> Iterator[Answer]:
        for question in questions:
            body = dict(question.body)
            self._judge.bodies.append(body)
            yield Answer(question, (Choice(self._judge.answer(body, 0), "stop"),))

    def close(self) -> None:
        return

    def usage(self) -> dict[str, float]:
        return {}


def texts_of(bodies: Sequence[dict[str, Any]]) -> list[str]:
    return [prompt_of(body) for body in bodies]
