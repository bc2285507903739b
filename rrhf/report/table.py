"""Rows as a table: Markdown for a page, aligned columns for a terminal.

A cell is "0.47 [0.40, 0.54]", mean and interval. Columns that no row fills are left out. An arrow
after a title says which way is better, where one is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """Attributes:
    title: its heading.
    digits: after the point.
    better: "↑", "↓" or "" where neither is better in itself.
    """

    title: str
    digits: int = 2
    better: str = ""

    @property
    def heading(self) -> str:
        return f"{self.title} {self.better}".strip()


COLUMNS: dict[str, Column] = {
    "reward": Column("reward", better="↑"),
    "gold": Column("gold", better="↑"),
    "win_reward": Column("win (reward)", better="↑"),
    "tie_reward": Column("tie (reward)"),
    "win_gold": Column("win (gold)", better="↑"),
    "tie_gold": Column("tie (gold)"),
    "pi_accuracy": Column("p_i accuracy", better="↑"),
    "pi_tie": Column("p_i tie"),
    "kl": Column("KL nats", better=""),
    "kl_k3": Column("KL (k3)"),
    "ppl_reference": Column("ppl_reference", better="↓"),
    "ppl_human": Column("ppl_human", better="↓"),
    "ppl_paper": Column("ppl_paper", better="↓"),
    "ppl_paper_e": Column("ppl_paper_e", better="↓"),
    "length": Column("tokens", 1),
    "words": Column("words", 1),
    "distinct_1": Column("distinct-1", 3),
    "distinct_2": Column("distinct-2", 3),
    "without_eos": Column("no EOS", better="↓"),
    "empty": Column("empty", better="↓"),
    "refused_harmful": Column("refused harmful", better="↑"),
    "refused_benign": Column("refused benign", better="↓"),
}
DEFAULT_COLUMNS: tuple[str, ...] = (
    "reward",
    "gold",
    "win_reward",
    "tie_reward",
    "win_gold",
    "tie_gold",
    "pi_accuracy",
    "kl",
    "ppl_reference",
    "ppl_human",
    "ppl_paper",
    "length",
    "distinct_2",
    "without_eos",
)
# Not estimates: what a row cost, and what is known of its policy.
FACT_COLUMNS: dict[str, Column] = {
    "generation_seconds": Column("seconds", 1),
    "serving_passes_per_response": Column("passes/response", 1),
    "serving_tokens_per_response": Column("tokens/response", 1),
    "tokens_per_second": Column("tokens/s", 0),
    "training_steps": Column("training steps", 0),
    "training_seconds": Column("training seconds", 0),
    "training_tokens": Column("training tokens", 0),
    "weight_distance": Column("weights moved", 4),
}
NOTHING = "-"


def format_estimate(
    value: Mapping[str, Any] | None, digits: int = 2, with_sign: bool = False
) -> str:
    """ "0.47 [0.40, 0.54]"; without an interval "0.47"; "-" where nothing was measured.

    Args:
        value: with "mean", "low", "high".
        digits: after the point.
        with_sign: a plus before a positive mean, as differences have it.
    """
    if value is None or value.get("mean") is None:
        return NOTHING
    text = format_number(value["mean"], digits)
    if with_sign and not text.startswith("-") and float(text) != 0:
        text = f"+{text}"
    if value.get("low") is None or value.get("high") is None:
        return text
    low, high = format_number(value["low"], digits), format_number(value["high"], digits)
    return f"{text} [{low}, {high}]"


def format_number(value: float, digits: int) -> str:
    """Fixed digits, no minus before a zero, powers of ten where a number is very large."""
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def column_of(metric: str) -> Column:
    """The column of a metric; parts of a gold preference are titled by their name."""
    if metric in COLUMNS:
        return COLUMNS[metric]
    if metric in FACT_COLUMNS:
        return FACT_COLUMNS[metric]
    return Column(metric.removeprefix("part_"))


def cell(row: Row, metric: str) -> str:
    """What a row says of a metric or a fact; the bound where best-of-N has no sampled KL."""
    column = column_of(metric)
    if metric in FACT_COLUMNS:
        value = fact_of(row, metric)
        return NOTHING if value is None else format_number(value, column.digits)
    metrics = row["metrics"]
    if metric == "kl" and "kl" not in metrics and metrics.get("kl_bound"):
        return f"≤ {format_estimate(metrics['kl_bound'], column.digits)}"
    return format_estimate(metrics.get(metric), column.digits)


def fact_of(row: Row, name: str) -> float | None:
    """A cost of a row, or a number that its policy has; None where it is not known."""
    cost = row.get("cost") or {}
    if name == "generation_seconds":
        return (cost.get("seconds") or {}).get("generation")
    if name.startswith("training_"):
        return (row.get("training") or {}).get(name.removeprefix("training_"))
    return row.get(name) if name == "weight_distance" else cost.get(name)


def table_cells(
    rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS
) -> tuple[list[str], list[list[str]]]:
    """Headings and cells; columns that are empty in every row are left out."""
    body = [[cell(row, metric) for row in rows] for metric in columns]
    kept = [
        (column_of(metric).heading, cells)
        for metric, cells in zip(columns, body, strict=True)
        if any(text != NOTHING for text in cells)
    ]
    headings = ["", *(heading for heading, _ in kept)]
    lines = [
        [str(row["name"]), *(cells[place] for _, cells in kept)] for place, row in enumerate(rows)
    ]
    return headings, lines


def markdown_table(rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS) -> str:
    """The table as Markdown, numbers to the right; ends with a newline."""
    headings, lines = table_cells(rows, columns)
    return markdown_lines(headings, lines)


def terminal_table(
    rows: Sequence[Row], columns: Sequence[str] = DEFAULT_COLUMNS, width: int = 120
) -> str:
    """The table for a terminal; what is wider than `width` goes on below, under the same names."""
    headings, lines = table_cells(rows, columns)
    return terminal_lines(headings, lines, width)


def markdown_lines(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Any cells as a Markdown table."""
    rule = ["---", *("---:" for _ in headings[1:])]
    escaped = [[text.replace("|", "\\|").replace("\n", " ") for text in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in [headings, rule, *escaped])


def terminal_lines(
    headings: Sequence[str], lines: Sequence[Sequence[str]], width: int = 120
) -> str:
    """Any cells as aligned text; the first column is repeated in every block."""
    widths = [
        max(len(line[place]) for line in [headings, *lines]) for place in range(len(headings))
    ]
    blocks: list[list[int]] = [[]]
    used = widths[0]
    for place in range(1, len(headings)):
        if blocks[-1] and used + 2 + widths[place] > width:
            blocks.append([])
            used = widths[0]
        blocks[-1].append(place)
        used += 2 + widths[place]
    texts = []
    for block in blocks:
        shown = []
        for line in [headings, *lines]:
            right = "".join(f"  {line[place]:>{widths[place]}}" for place in block)
            shown.append(f"{line[0]:<{widths[0]}}{right}".rstrip() + "\n")
        shown.insert(1, "-" * (widths[0] + sum(2 + widths[place] for place in block)) + "\n")
        texts.append("".join(shown))
    return "\n".join(texts)


def notes_of(rows: Sequence[Row]) -> str:
    """What rows say about their own numbers, one line each."""
    return "".join(f"{row['name']}: {note}\n" for row in rows for note in row.get("notes", ()))
