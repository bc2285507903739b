"""Candidate files to train a tiny model on, and what to read from a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

WORDS = ("plants", "alive", "ask", "friend", "help", "again", "now", "quick", "fox", "lazy dog")


def ranked_rows(num_prompts: int = 12) -> list[dict[str, Any]]:
    """Ragged groups in RRHF's published form: ties, single candidates and long responses occur."""
    generator = torch.Generator().manual_seed(7)

    def words(n: int) -> str:
        picks = torch.randint(len(WORDS), (n,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picks)

    rows = []
    for number in range(num_prompts):
        count = (3, 1, 4, 2, 5)[number % 5]
        lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
        scores = torch.randint(-2, 3, (count,), generator=generator).tolist()
        if number == 3:
            scores = [1] * count
        rows.append(
            {
                "query": f"\n\nHuman: how to {words(1 + number % 4)}\n\nAssistant:",
                "responses": [" " + words(n) for n in lengths],
                "scores": [float(score) for score in scores],
            }
        )
    return rows


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_weights(left: Path, right: Path) -> bool:
    """True where two model folders hold bit-identical weights."""
    a, b = (load_file(folder / "model.safetensors") for folder in (left, right))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
