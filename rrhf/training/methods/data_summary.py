"""Summarises a trainer's data in one log line: what is used, what was cut or left out.

Each reason for a cut or an omission is reported once, with its count and the id of the first prompt
affected. The run's manifest has the same counts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rrhf.commands import next_step
from rrhf.data.collate import EncodedSet
from rrhf.data.columns import columns_flag
from rrhf.data.formats import SourceCounts
from rrhf.data.prompt_formats import PromptFormats
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.training.core.streams import EncodedExamples
from rrhf.training.methods.fitting import RowFitter

logger = logging.getLogger(__name__)

# Name of a count -> what is counted (a noun), and what happened to it.
_CASES = {
    "prompts_cut": ("prompt", "cut on the left to fit --model_max_length {length}"),
    "prompts_too_long": (
        "prompt",
        "left out: the last turn alone does not fit --model_max_length {length}",
    ),
    "prompts_empty": ("prompt", "without text"),
    "prompts_without_responses": ("prompt", "left out: no response is left"),
    "prompts_without_candidates": ("prompt", "left out: no candidate to rank"),
    "prompts_without_ordered_pair": ("prompt", "left out: no response is better than another"),
    "prompts_beyond_the_window": ("prompt", "left out: longer than the model's window"),
    "prompts_with_one_candidate": ("prompt", "with one candidate, so nothing to rank"),
    "prompts_all_tied": ("prompt", "with only equal scores, so nothing to rank"),
    "responses_cut": ("response", "cut at the end to fit, and trained without an end"),
    "responses_dropped": ("response", "left out as too long"),
    "responses_cut_to_nothing": ("response", "left out as empty"),
    "responses_stopped": ("response", "cut where the next turn begins"),
    "candidates_without_score": ("candidate", "left out without a score"),
}
# Reasons for which `rrhf.data.views` leaves out rows that lack scores.
_UNSCORED = ("nothing_scored", "no_ordered_pair", "several_unscored_responses")
_USED = ("prompts", "prompts_used", "candidates_used", "responses_used")


class Encoder(Protocol):
    """Turns candidate sets into training examples; its `fitter` counts what is cut or left out."""

    @property
    def fitter(self) -> RowFitter: ...

    def __call__(self, candidate_set: CandidateSet, /) -> EncodedSet | None: ...


@dataclass(frozen=True)
class Survey:
    """How to find out, at the start of a run, which sets yield an example.

    Attributes:
        yields: returns whether a set yields an example, if possible without encoding the set.
        identity: a hash of the data and the limits; it changes when the examples change.
        is_quick: True = call `yields` for each set; False = encode every set.
    """

    yields: Callable[[CandidateSet], bool]
    identity: str
    is_quick: bool


def encoded(
    name: str,
    sets: Sequence[CandidateSet],
    encode: Encoder,
    read: SourceCounts | None = None,
    purpose: str = "training",
    columns: str | None = None,
    survey: Survey | None = None,
) -> EncodedExamples:
    """Encode candidate sets as training or evaluation examples, and log a summary.

    Args:
        name: the name of the data, as the user gave it.
        sets: the sets to encode.
        encode: turns a set into an example and counts what is cut or left out.
        read: counts of the source's rows, if known.
        purpose: "training", or "evaluating".
        columns: the --columns setting; it is repeated in the `rrhf score` command that an error
            message suggests.
        survey: how to find the sets that yield an example; None = encode every set.

    Raises:
        UserError: no set yields an example; the message says why.
    """
    formats = PromptFormats(encode.fitter.codec)

    def encode_and_count(candidate_set: CandidateSet) -> EncodedSet | None:
        formats.add(candidate_set)
        return encode(candidate_set)

    def yields(candidate_set: CandidateSet) -> bool:
        assert survey is not None, "yields is called only with a survey"
        formats.add(candidate_set)
        return survey.yields(candidate_set)

    identity = None if survey is None else survey.identity
    is_quick = survey is not None and survey.is_quick
    try:
        examples = EncodedExamples(sets, encode_and_count, yields if is_quick else None, identity)
    except UserError as error:
        why = [
            *describe_rows(read),
            *describe_cuts(encode.fitter),
            *_score_first(name, encode, read, columns),
        ]
        raise UserError(f"{name}: {error}" + (f": {'; '.join(why)}" if why else "")) from error
    used = counted(len(examples), "prompt")
    for what in ("candidate", "response"):
        if number := encode.fitter.counts[f"{what}s_used"]:
            used += f" with {counted(number, what)}"
    rows = f" from {counted(read.read, 'row')}" if read else ""
    parts = [f"{purpose} on {used}{rows}", *describe_rows(read), *describe_cuts(encode.fitter)]
    if is_quick:
        parts.append("--max_steps: encoded when they are used, so what is cut is not counted")
    logger.info("%s: %s", name, "; ".join(parts))
    formats.tell(name)
    return examples


def _score_first(
    name: str, encode: Encoder, read: SourceCounts | None, columns: str | None
) -> list[str]:
    """Return the `rrhf score` command to suggest if scores are missing, else an empty list."""
    dropped = read.dropped if read is not None else {}
    unscored = encode.fitter.counts["candidates_without_score"]
    if not (unscored or any(dropped.get(reason) for reason in _UNSCORED)):
        return []
    words = [name, "SCORED.jsonl", "--scorer", "REWARD_MODEL", *columns_flag(columns)]
    step = next_step("rrhf", "score", *words)
    return [f"score the responses first: {step}"]


def describe_cuts(fitter: RowFitter) -> list[str]:
    """Return phrases for what was cut or left out, one for each reason."""
    told = []
    for case, number in fitter.counts.items():
        if case in _USED or not number:
            continue
        what, happened = _CASES.get(case, ("prompt", case.replace("_", " ")))
        first = f" (first: prompt {fitter.first[case]})" if case in fitter.first else ""
        happened = happened.format(length=fitter.model_max_length)
        told.append(f"{counted(number, what)} {happened}{first}")
    return told


def describe_rows(read: SourceCounts | None) -> list[str]:
    """Return phrases for the rows that were left out or changed on loading, one for each reason."""
    if read is None:
        return []
    kinds: list[tuple[Mapping[str, int], str]] = [
        (read.dropped, "left out"),
        (read.mended, "changed"),
    ]
    return [
        f"{counted(number, 'row')} {happened} ({reason.replace('_', ' ')})"
        for reasons, happened in kinds
        for reason, number in reasons.items()
    ]


def counted(number: int, what: str) -> str:
    """Format a number with its noun, in the plural if needed: "1 prompt", "1,234 prompts"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
