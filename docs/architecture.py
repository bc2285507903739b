"""Draws docs/architecture.svg and the table of imports in docs/architecture.md.

    python docs/architecture.py

Floors come from the contracts in setup.cfg, arrows from the import statements of rrhf/. What
follows from other arrows is left out of the picture: where A imports B and C, and B imports C, the
arrow from A to C is not drawn; the table has it. The lowest floors, from `model_paths` down, may be
imported from everywhere above and have no arrows.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports -->", "<!-- end of imports -->"

Edges = set[tuple[str, str]]
"""(room, room that it imports)."""


@dataclass(frozen=True)
class Place:
    """A room's box: its centre and width in pixels, and what stands under its name."""

    x: int
    width: int
    text: str


ROOMS = {
    "cli": Place(300, 250, "one file a command"),
    "studies": Place(600, 250, "demonstration, comparisons"),
    "training.rounds": Place(160, 220, "sample, score, train, repeat"),
    "training.online": Place(400, 220, "rollouts, PPO, GRPO, ..."),
    "training.methods": Place(330, 250, "SFT, reward model, ranking"),
    "training.core": Place(180, 250, "the loop, checkpoints, ranks"),
    "report": Place(780, 220, "tables, figures"),
    "evaluation": Place(700, 250, "what is measured of a policy"),
    "generation": Place(565, 210, "prompts to responses"),
    "scoring": Place(800, 210, "responses to scores"),
    "stages": Place(905, 180, "files that survive a kill"),
    "models": Place(240, 250, "loading, log-probs, layouts"),
    "worlds": Place(690, 210, "tasks whose truth is known"),
    "data": Place(512, 945, "files and records, chat formats, batches"),
}
"""Every package with arrows. A package that is missing here ends the command with a message."""

FLOOR, BOX, SMALL, TOP, WIDTH = 88, 48, 30, 20, 1025
INK, LINE, FILL, GROUND = "#222222", "#5b6b7a", "#e8f0f7", "#f4f1ea"


def floors(setup: Path = ROOT / "setup.cfg") -> list[list[str]]:
    """The layers of setup.cfg from the top down, with training's own floors in their place."""
    parser = configparser.ConfigParser()
    parser.read(setup)

    def layers(contract: str) -> list[list[str]]:
        lines = parser[f"importlinter:contract:{contract}"]["layers"].split("\n")
        return [
            [name.strip() for name in re.split(r"[|:]", line) if not name.strip().startswith("(")]
            for line in lines
            if line.strip()
        ]

    inner = [[f"training.{name}" for name in layer] for layer in layers("training-floors")]
    found = []
    for layer in layers("floors"):
        if "training" in layer:
            found += [*inner[:-1], [*inner[-1], *(name for name in layer if name != "training")]]
        else:
            found.append(layer)
    return found


def imports(package: Path = ROOT / "rrhf") -> Edges:
    """Which room imports which, imports inside functions included."""
    found: Edges = set()
    for path in sorted(package.rglob("*.py")):
        module = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
        for target in _imported(path, package.name):
            edge = (_room(module), _room(target))
            if "" not in edge and edge[0] != edge[1]:
                found.add(edge)
    return found


def _imported(path: Path, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith(package))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(package):
            whole = node.module == package
            yield from (
                [f"{package}.{alias.name}" for alias in node.names] if whole else [str(node.module)]
            )


def _room(module: str) -> str:
    """`training.core` for a module in it, else the name under `rrhf`; "" for rrhf itself."""
    parts = module.split(".")[1:]
    if not parts or parts[0] in ("__init__", "__version__"):
        return ""
    return ".".join(parts[:2]) if parts[0] == "training" else parts[0]


def needed(edges: Edges) -> list[tuple[str, str]]:
    """The edges that do not follow from others: the transitive reduction."""
    following: dict[str, set[str]] = {}
    for start, end in edges:
        following.setdefault(start, set()).add(end)

    def reached(start: str, without: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name for name in following[start] if name != without]
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += following.get(name, ())
        return seen

    return sorted(edge for edge in edges if edge[1] not in reached(*edge))


def table(edges: Edges) -> str:
    """Every import from one room of the picture to another."""
    lines = ["| room | imports |", "|---|---|"]
    for room in ROOMS:
        found = [f"`{other}`" for other in ROOMS if (room, other) in edges]
        lines.append(f"| `{room}` | {', '.join(found) or 'none of them'} |")
    return "\n".join(lines)


def picture(edges: Edges, layers: list[list[str]]) -> str:
    """The drawing as SVG.

    Raises:
        SystemExit: a package has no place in `ROOMS`.
    """
    packages = [path.parent.name for path in (ROOT / "rrhf").glob("*/__init__.py")]
    known = {room.partition(".")[0] for room in ROOMS} | {"presets"} | _ground(layers)
    if missing := sorted(set(packages) - known):
        sys.exit(f"docs/architecture.py: give {', '.join(missing)} a place in ROOMS")
    rows = [layer for layer in layers if set(layer) & set(ROOMS)]
    tops = {}
    y = TOP
    for layer in rows:
        # rooms of one floor that import one another stand one above the other
        lower = {end for start, end in edges if start in layer and end in layer}
        for part in ([name for name in layer if name not in lower], sorted(lower)):
            if part:
                tops |= dict.fromkeys(part, y)
                y += FLOOR
    tops["report"] = tops["training.online"]
    shapes = [_training_frame(tops), *_arrows(edges, tops)]
    for name, top in tops.items():
        place = ROOMS[name]
        left = place.x - place.width / 2
        shapes.append(_box(left, top, place.width, BOX, FILL))
        shapes.append(_words(place.x, top + 20, name.removeprefix("training."), bold=True))
        shapes.append(_words(place.x, top + 38, place.text, size=12))
    shapes.append(
        _words(WIDTH / 2, y + 4, "imported from every floor above them, without arrows:", size=12)
    )
    y += 16
    for layer in layers:
        names = [name for name in layer if name in _ground(layers)]
        if not names:
            continue
        width = (945 - 10 * (len(names) - 1)) / len(names)
        for place_in_row, name in enumerate(names):
            left = 40 + place_in_row * (width + 10)
            shapes.append(_box(left, y, width, SMALL - 4, GROUND))
            shapes.append(_words(left + width / 2, y + 18, name, size=13))
        y += SMALL
    return "\n".join([_HEAD.format(width=WIDTH, height=y + 10), *shapes, "</svg>", ""])


def _ground(layers: list[list[str]]) -> set[str]:
    return {name for layer in layers for name in layer} - set(ROOMS) - {"training"}


def _arrows(edges: Edges, tops: Mapping[str, int]) -> Iterator[str]:
    drawn = needed({edge for edge in edges if edge[0] in tops and edge[1] in tops})
    for start, end in drawn:
        out = sorted((e for e in drawn if e[0] == start), key=lambda e: ROOMS[e[1]].x)
        into = sorted((e for e in drawn if e[1] == end), key=lambda e: ROOMS[e[0]].x)
        x1 = _port(ROOMS[start], out.index((start, end)), len(out))
        x2 = _port(ROOMS[end], into.index((start, end)), len(into))
        target = ROOMS[end]
        if target.width > 500:  # straight down into a wide box
            x2 = x1
        y1, y2 = tops[start] + BOX, tops[end]
        bend = min((y2 - y1) / 2, 60)
        yield (
            f'<path d="M {x1:.0f} {y1} C {x1:.0f} {y1 + bend:.0f}, {x2:.0f} {y2 - bend:.0f}, '
            f'{x2:.0f} {y2 - 3}" fill="none" stroke="{LINE}" stroke-width="1.5" '
            'marker-end="url(#head)"/>'
        )


def _port(place: Place, index: int, count: int) -> float:
    return place.x + (index - (count - 1) / 2) * min(40, place.width / (count + 1))


def _training_frame(tops: Mapping[str, int]) -> str:
    inner = [top for name, top in tops.items() if name.startswith("training.")]
    first, last = min(inner) - 26, max(inner) + BOX + 12
    frame = (
        f'<rect x="35" y="{first}" width="490" height="{last - first}" rx="8" fill="none" '
        f'stroke="{LINE}" stroke-dasharray="5 4"/>'
    )
    return frame + "\n" + _words(80, first + 18, "training", bold=True)


def _box(left: float, top: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{left:.0f}" y="{top:.0f}" width="{width:.0f}" height="{height:.0f}" rx="5" '
        f'fill="{fill}" stroke="{LINE}"/>'
    )


def _words(x: float, y: float, text: str, size: int = 15, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}"{weight} text-anchor="middle">'
        f"{escape(text)}</text>"
    )


_HEAD = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    'viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" fill="'
    + INK
    + '">\n<title>Rooms of rrhf by floor, and which imports which</title>\n'
    '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="8" '
    'markerHeight="8" orient="auto"><path d="M 0 1 L 9 5 L 0 9 z" fill="'
    + LINE
    + '"/></marker></defs>\n<rect width="100%" height="100%" fill="#ffffff"/>'
)


def page(edges: Edges, text: str) -> str:
    """The page with its table of imports written anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(edges)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    edges = imports()
    PICTURE.write_text(picture(edges, floors()))
    PAGE.write_text(page(edges, PAGE.read_text()))


if __name__ == "__main__":
    main()
