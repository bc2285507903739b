"""What an evaluation found, in a line, and signs that its figures mean little."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rrhf.progress import without_negative_zeros

Row = Mapping[str, Any]

_SHOWN = {
    "gold": ("gold", 2),
    "reward": ("reward", 2),
    "win_gold": ("wins by gold", 2),
    "win_reward": ("wins by reward", 2),
    "kl": ("KL", 2),
    "ppl_reference": ("ppl_reference", 2),
    "ppl_human": ("ppl_human", 2),
}
_MOST = 3


def reached(rows: Sequence[Row]) -> str:
    """The policy's first row in a sentence, next to that of its baseline.

    Args:
        rows: of an evaluation, those of the baseline first.
    """
    row = _first_of_policy(rows)
    before = None if row is rows[0] else rows[0]
    parts: list[str] = []
    for metric, (name, digits) in _SHOWN.items():
        if (told := _told(row, metric, digits)) is None or len(parts) == _MOST:
            continue
        other = None if before is None or metric.startswith(("win", "kl")) else before
        was = None if other is None else _told(other, metric, digits)
        parts.append(f"{name} {told}" + (f" (before: {was})" if was else ""))
    num_prompts = row["made_with"]["num_prompts"]
    against = f" against {before['name']}" if before is not None else ""
    figures = ", ".join(parts) or "no scorer, gold or reference to measure by"
    figures = without_negative_zeros(figures)
    noun = "prompt" if num_prompts == 1 else "prompts"
    return f"{row['name']}{against}, {num_prompts:,} {noun}: {figures}"


def signs_of_nothing(rows: Sequence[Row]) -> list[str]:
    """Sentences about rows that cannot show anything: no response ends, all rewards are equal."""
    signs = []
    for row in rows:
        most = row["made_with"]["decoding"].get("max_new_tokens")
        ends = row["metrics"].get("without_eos", {})
        if most is not None and ends.get("mean") == 1.0:
            signs.append(
                f"{row['name']}: no response ends: all were cut at --max_new_tokens {most}, and "
                "rewards are of unfinished answers; raise it, or look at --chat_format"
            )
        values = row["per_prompt"].get("reward", {}).get("values", {})
        if len(values) > 1 and len(set(values.values())) == 1:
            signs.append(
                f"{row['name']}: all rewards are equal ({next(iter(values.values())):.4g}): the "
                "scorer tells nothing apart; look at --scorer"
            )
    return signs


def _first_of_policy(rows: Sequence[Row]) -> Row:
    """The first row of the policy; those of the baseline come before it."""
    measured = [
        config.get("model_name_or_path") or config.get("responses")
        for config in (row.get("config") or {} for row in rows)
    ]
    last = measured[-1]
    return rows[measured.index(last)]


def _told(row: Row, metric: str, digits: int) -> str | None:
    value = row["metrics"].get(metric) or {}
    if value.get("mean") is None:
        return None
    interval = ""
    if value.get("low") is not None:
        interval = f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value['mean']:.{digits}f}{interval}"
