"""The results file of the programme: every item as it comes, whole or not at all.

`gpu.json` holds, for each part, its items with their results, and what was left out and why. An
item counts as done where these very sources ran it with these settings on this device; failures and
what a budget cut short are tried again. `gpu.md` says the same for people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.gpu_step import add_ratios

FILE, REPORT = "gpu.json", "gpu.md"
DONE, FAILED, LEFT_OUT, CUT = "done", "failed", "left out", "cut short"


class Book:
    """Results by part and item.

    Args:
        folder: for both files; made where it is missing.
        settings: that decide whether an earlier result still counts.
        fresh: forget what is there.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._key = {**settings, "sources": harness.code()["sources"]}
        self.parts: dict[str, dict[str, Any]] = {}
        path = folder / FILE
        if path.exists() and not fresh:
            self.parts = json.loads(path.read_text())["parts"]

    def status(self, part: str, item: str) -> str | None:
        """How an item stands; None where it was not begun, or counts no more."""
        entry = self.items(part).get(item)
        if entry is None or entry["key"] != self._key:
            return None
        return str(entry["status"])

    def is_settled(self, part: str, item: str) -> bool:
        """Whether it need not be run again."""
        return self.status(part, item) in (DONE, LEFT_OUT)

    def is_complete(self, part: str) -> bool:
        """Whether a part came to its end, and nothing of it need be run again."""
        is_done = self.parts.get(part, {}).get("complete") == self._key
        return is_done and all(self.is_settled(part, item) for item in self.items(part))

    def complete(self, part: str) -> None:
        """A part came to its end."""
        self.parts[part]["complete"] = self._key
        self.write()

    def items(self, part: str) -> dict[str, dict[str, Any]]:
        """Name -> status, line, seconds, result."""
        found: dict[str, dict[str, Any]] = self.parts.get(part, {}).get("items", {})
        return found

    def put(
        self, part: str, item: str, status: str, line: str, seconds: float = 0.0, **result: Any
    ) -> None:
        """Write an item's result down."""
        entry = {"status": status, "line": line, "seconds": round(seconds, 1), "key": self._key}
        kept = self.parts.setdefault(part, {"items": {}})
        kept["items"][item] = {**entry, "commit": harness.code()["commit"], **result}
        self.write()

    def note(self, part: str, text: str | None) -> None:
        """What is to be said of a whole part, or None."""
        self.parts.setdefault(part, {"items": {}})["note"] = text
        self.write()

    def only(self, part: str, items: list[str]) -> None:
        """What the part has: others are forgotten, and those that are there take its order."""
        kept = self.items(part)
        ordered = {item: kept[item] for item in items if item in kept}
        self.parts.setdefault(part, {})["items"] = ordered

    def write(self) -> None:
        """Both files, each replaced as a whole."""
        whole = {"benchmark": "gpu", "settings": self._key, "parts": self.parts}
        _replace(self.folder / FILE, json.dumps(whole, indent=1) + "\n")
        _replace(self.folder / REPORT, report(self.parts))

    def failures(self) -> list[str]:
        """Part and item of everything that failed."""
        return [
            f"{part} {item}: {entry['line']}"
            for part in self.parts
            for item, entry in self.items(part).items()
            if entry["status"] == FAILED
        ]


def _replace(path: Path, text: str) -> None:
    staged = path.with_name(path.name + ".part")
    with open(staged, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def report(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each part."""
    lines = ["# The programme for a GPU", ""]
    for part, entry in parts.items():
        lines += [f"## {part}", ""]
        if entry.get("note"):
            lines += [f"{entry['note']}", ""]
        if entry["items"]:
            lines += ["| item | | result | seconds |", "|---|---|---|---|"]
        for item, one in entry["items"].items():
            text = " ".join(one["line"].split()).replace("|", "\\|")
            lines.append(f"| {item} | {one['status']} | {text} | {one['seconds']:.1f} |")
        lines.append("")
    return "\n".join(lines)


def results(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What a programme at full size has found, for the README: itself, and its steps by case."""
    path = folder / FILE
    whole = json.loads(path.read_text()) if path.exists() else {"settings": {"tiny": True}}
    if whole["settings"]["tiny"]:
        return {}
    parts = whole["parts"]
    facts = parts.get("preflight", {}).get("items", {}).get("environment", {})
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in parts.get("step", {}).get("items", {}).values():
        if "numbers" not in entry:
            continue
        name = entry["case"]
        common = {"machine": facts["machine"], "code": {"commit": entry["commit"]}, "ways": {}}
        case = {"benchmark": "gpu_step", "case": name, "sizes": entry["sizes"], **common}
        found.setdefault(("gpu_step", name), case)["ways"][entry["way"]] = entry["numbers"]
    for result in found.values():
        add_ratios(result["ways"])
    found["gpu", "programme"] = {**whole, "not_measured": "a programme"}
    return found
