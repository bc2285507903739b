"""Draws docs/gold_by_method.svg, the README's picture, from paper/methods.json.

    python docs/gold_by_method.py

Gold of every method with its 95 % interval, and what the method costs, as `rrhf compare --world
help_desk --seeds 3` measured them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "paper" / "methods.json"
PICTURE = ROOT / "docs" / "gold_by_method.svg"

LOW, HIGH, STEP = -0.2, 0.5, 0.1
LEFT, RIGHT, TOP, ROW, WIDTH = 190, 640, 56, 27, 860
INK, FAINT, RANKING, OTHER = "#222222", "#d9d9d9", "#0072b2", "#555555"


def picture(rows: Mapping[str, Any]) -> str:
    """The drawing as SVG; `rows` is the `rows` of paper/methods.json."""
    bottom = TOP + ROW * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 44}" '
        f'viewBox="0 0 {WIDTH} {bottom + 44}" font-family="Helvetica, Arial, sans-serif" '
        f'fill="{INK}">',
        "<title>Gold by method, with 95 % intervals</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(LEFT, 22, "Gold (what people want) on held-out prompts, three seeds", 15, "start"),
        _text(700, 22, "training,", 12),
        _text(700, 38, "CPU seconds", 12),
        _text(800, 22, "networks", 12),
        _text(800, 38, "in memory", 12),
    ]
    for number in range(round((HIGH - LOW) / STEP) + 1):
        value = LOW + STEP * number
        shade = INK if abs(value) < STEP / 2 else FAINT
        parts.append(_line(_x(value), TOP - 8, _x(value), bottom, shade))
        parts.append(_text(_x(value), bottom + 18, f"{value:.1f}".replace("-0.0", "0.0"), 12))
    parts.append(_text(_x(0.15), bottom + 36, "higher is better; lines are 95 % intervals", 12))
    for place, (name, row) in enumerate(rows.items()):
        parts += _row(TOP + ROW * place + ROW / 2, name, row)
    return "\n".join([*parts, "</svg>", ""])


def _row(y: float, name: str, row: Mapping[str, Any]) -> Iterator[str]:
    gold = row["metrics"]["gold"]
    colour = RANKING if "rrhf" in name else OTHER
    yield _text(LEFT - 14, y + 5, row["name"], 14, "end")
    yield _line(_x(gold["low"]), y, _x(gold["high"]), y, colour, 2.5)
    yield f'<circle cx="{_x(gold["mean"]):.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>'
    for x, name in ((700, "cpu_seconds"), (800, "networks")):
        yield _text(x, y + 5, f"{row['cost'][name]:.0f}" if row["cost"][name] else "-", 13)


def _x(value: float) -> float:
    return LEFT + (RIGHT - LEFT) * (value - LOW) / (HIGH - LOW)


def _text(x: float, y: float, text: str, size: int, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width:g}"/>'
    )


def main() -> None:
    PICTURE.write_text(picture(json.loads(SOURCE.read_text())["rows"]))


if __name__ == "__main__":
    main()
