"""Compute statistics of a data source: candidates per prompt, ties, lengths, scores.

Lengths are in characters and words, because no tokenizer is given. Texts are read one at a time,
and only their lengths are kept in memory.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rrhf.data.views import first_turn
from rrhf.records import CandidateSet


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """Compute minimum, mean, median, 95th percentile and maximum; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "mean": math.fsum(ordered) / len(ordered),
        "median": ordered[last // 2],
        "p95": ordered[min(last, math.ceil(0.95 * len(ordered)) - 1)],
        "max": ordered[-1],
    }


def measure_sets(sets: Iterable[CandidateSet]) -> dict[str, Any]:
    """Compute the figures of sets, under the names that are printed."""
    figures: Counter[str] = Counter()
    histogram: Counter[int] = Counter()
    sources: Counter[str] = Counter()
    finish_reasons: Counter[str] = Counter()
    origins: Counter[str] = Counter()
    numbers = {
        name: array("d")
        for name in ("query_characters", "response_characters", "response_words", "scores")
    }
    opened: set[int] = set()
    for item in sets:
        figures["prompts"] += 1
        figures["conversations"] += item.messages is not None and not item.is_plain
        opened.add(hash(first_turn(item)))
        origins[item.origin] += 1
        numbers["query_characters"].append(len(item.query))
        histogram[len(item.candidates)] += 1
        for candidate in item.candidates:
            figures["responses"] += 1
            figures["empty_responses"] += not candidate.response.strip()
            sources[candidate.source] += 1
            finish_reasons[candidate.finish_reason] += 1
            numbers["response_characters"].append(len(candidate.response))
            numbers["response_words"].append(len(candidate.response.split()))
        scores = [score for score in item.scores if score is not None]
        numbers["scores"].extend(scores)
        figures["scored_responses"] += len(scores)
        figures["prompts_with_ties"] += len(set(scores)) < len(scores)
        figures["prompts_with_all_scores_equal"] += len(set(scores)) == 1 < len(scores)
        figures["ordered_pairs"] += _ordered_pairs(scores)
        texts = item.responses
        figures["prompts_with_repeated_responses"] += len(set(texts)) < len(texts)
    figures["first_turns"] = len(opened)
    return {
        **figures,
        "responses_per_prompt": {str(count): histogram[count] for count in sorted(histogram)},
        "sources": dict(sources.most_common()),
        "finish_reasons": dict(finish_reasons.most_common()),
        "origins": dict(origins.most_common()),
        **{name: _spread(values) for name, values in numbers.items()},
    }


def _ordered_pairs(scores: list[float]) -> int:
    equal = sum(count * (count - 1) // 2 for count in Counter(scores).values())
    return len(scores) * (len(scores) - 1) // 2 - equal


def format_figures(figures: dict[str, Any]) -> str:
    """Format the figures as lines for the terminal."""
    width = max(len(name) for name in figures)
    return "\n".join(f"{name:<{width}}  {_format(value)}" for name, value in figures.items())


def _format(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key or '(none)'}: {_format(item)}" for key, item in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
