"""The tables of the README, from the results alone: no figure is copied by hand.

A table stands between `<!-- benchmarks NAME -->` and `<!-- end of benchmarks NAME -->`.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import registry

Results = Mapping[tuple[str, str], Mapping[str, Any]]


def write(readme: Path, results: Results) -> None:
    """Fill in every marked table.

    Raises:
        ValueError: the file has a mark of a table that is not known.
    """
    text = readme.read_text()

    def filled(found: re.Match[str]) -> str:
        name = found.group(2)
        if name not in TABLES:
            raise ValueError(f"{readme}: no table {name!r}; there are {', '.join(TABLES)}")
        return f"{found.group(1)}\n{TABLES[name](results)}\n{found.group(3)}"

    marked = r"(<!-- benchmarks (\w+) -->)\n.*?(<!-- end of benchmarks \2 -->)"
    readme.write_text(re.sub(marked, filled, text, flags=re.DOTALL))


def timings(results: Results) -> str:
    """A row for each variant of each case: the first is the one that the goal is about."""
    head = ["benchmark", "sizes", "baseline, ms", "variant, ms", "times as fast [range]"]
    rows = [[*head, "rounds", "goal", "FLOP ratio", "load"]]
    for name, case, result in _cases(results):
        label = f"`{name}` {case}"
        if result is None or "not_measured" in result or "timings" not in result:
            if _is_of("timings", name):
                rows.append([label, _sizes(name, case, result), *_missing(result), *[""] * 6])
            continue
        (baseline, base), *others = result["timings"].items()
        for number, (variant, timing) in enumerate(others):
            ratio = timing["speed_up"]
            median, span = ratio["median"], f"[{ratio['lowest']:.2f}-{ratio['highest']:.2f}]"
            goal = result["goal"] if number == 0 else None
            theory = result.get("theory")
            rows.append(
                [
                    label if number == 0 else "",
                    _sizes(name, case, result) if number == 0 else "",
                    f"{baseline} {_milliseconds(base)}" if number == 0 else "",
                    f"{variant} {_milliseconds(timing)}",
                    f"{_bold(median, goal)} {span}",
                    str(len(timing["seconds"])),
                    _met(median, goal),
                    f"{theory:.2f}" if theory and number == 0 else "",
                    _load(result) if number == 0 else "",
                ]
            )
    return _markdown(rows)


def memory(results: Results) -> str:
    """Extra memory of a step."""
    rows = [["benchmark", "sizes", "baseline, MiB", "variant, MiB", "times less", "goal"]]
    for name, case, result in _cases(results):
        label = f"`{name}` {case}"
        if result is None or "extra_mib" not in result:
            if _is_of("memory", name):
                rows.append([label, _sizes(name, case, result), *_missing(result), *[""] * 3])
            continue
        (baseline, base), *others = result["extra_mib"].items()
        for number, (variant, value) in enumerate(others):
            less = result["times_less"][variant]
            goal = result["goal"] if number == 0 else None
            row = [
                label,
                _sizes(name, case, result),
                f"{baseline} {base:.0f}",
                f"{variant} {value:.0f}",
            ]
            rows.append([*row, _bold(less, goal), _met(less, goal)])
    return _markdown(rows)


def machine(results: Results) -> str:
    """Where the figures come from, one line for each machine and set of versions."""
    found: dict[str, None] = {}
    for result in results.values():
        it, code = result["machine"], result.get("code", {})
        place = it.get("gpu") or f"{it['cpu']}, {it['cores']} cores, {it['threads']} thread"
        packages = {"torch": it["torch"], "transformers": it["transformers"]}
        packages |= result.get("versions", {})
        versions = ", ".join(f"{package} {version}" for package, version in packages.items())
        found[f"{place}; Python {it['python']}, {versions}; commit {code.get('commit')}"] = None
    return "\n".join(f"- {line}" for line in found) or "Nothing is measured yet."


TABLES: dict[str, Callable[[Results], str]] = {
    "timings": timings,
    "memory": memory,
    "machine": machine,
}
OF_MEMORY = ("peak_memory",)


def _cases(results: Results) -> list[tuple[str, str, Mapping[str, Any] | None]]:
    named = [(name, case) for name in registry.NAMES for case in registry.load(name).CASES]
    return [(name, case, results.get((name, case))) for name, case in named]


def _is_of(table: str, name: str) -> bool:
    """Whether a case that was not measured is to be named in this table."""
    return (name in OF_MEMORY) == (table == "memory")


def _missing(result: Mapping[str, Any] | None) -> list[str]:
    reason = (result or {}).get("not_measured")
    return [f"not measured: {reason}" if reason else "not measured"]


def _sizes(name: str, case: str, result: Mapping[str, Any] | None) -> str:
    return (result or {}).get("sizes") or registry.sizes_of(registry.load(name).CASES[case])


def _milliseconds(timing: Mapping[str, Any]) -> str:
    return f"{1000 * statistics.median(timing['seconds']):.0f}"


def _bold(value: float, goal: float | None) -> str:
    return f"**{value:.2f}**" if goal else f"{value:.2f}"


def _met(value: float, goal: float | None) -> str:
    return "" if goal is None else f"{goal:g}: {'met' if value >= goal else 'missed'}"


def _load(result: Mapping[str, Any]) -> str:
    """Before and after."""
    return f"{result.get('load_before', '')}, {result['machine']['load']}"


def _markdown(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
