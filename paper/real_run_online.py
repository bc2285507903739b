"""The part of the real-model report that sets RRHF against PPO: rewards, KL, and what each cost.

Every figure is read from the run folders and rows that `paper/real_run.sh` left.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from curves import draw_curves

from rrhf.evaluation.bootstrap import paired_difference
from rrhf.evaluation.results import load_row, measure_from_json
from rrhf.manifests import read_manifest
from rrhf.report.table import NOTHING, format_estimate, format_number, markdown_lines
from rrhf.runs import settings_file
from rrhf.training.online.methods import METHODS

SAMPLES = "_4_samples"
"""Rewards are taken from rows with several samples a prompt: one says too little."""


@dataclass(frozen=True)
class Method:
    """Attributes:
    folder: of the run, below the study's.
    name: in the table.
    row: name of its row's file.
    step: of the script, that trained it.
    """

    folder: str
    name: str
    row: str
    step: str


OFFLINE = Method("rrhf", "RRHF offline", "RRHF", "4-rrhf")
ONLINE = (
    Method("online_rrhf", "RRHF online", "online_RRHF", "12-online-rrhf"),
    Method("ppo_lora", "PPO, LoRA", "PPO_LoRA", "13-ppo-lora"),
    Method("ppo", "PPO, all weights", "PPO", "14-ppo"),
)


def finished(out: Path) -> list[Method]:
    """The online methods that were trained and evaluated."""
    return [
        method
        for method in ONLINE
        if (out / method.folder / "manifest.json").exists()
        and (out / "rows" / f"{method.row}{SAMPLES}.json").exists()
    ]


def row_files(out: Path) -> list[str]:
    """Names of the online methods' row files, as the large table expects them."""
    return [f"{method.row}{kind}" for method in finished(out) for kind in ("", SAMPLES, "_greedy")]


def online_section(out: Path) -> list[str]:
    """Paragraphs of the page; none where no online method was run."""
    methods = finished(out)
    if not methods:
        return []
    picture = draw_curves(
        {
            "mean score of a rollout": {m.name: rollout_curve(out, m, "score") for m in methods},
            "KL from the base, nats a response": {
                m.name: rollout_curve(out, m, "kl") for m in methods
            },
        },
        out / "real_run_online.png",
        window=1,
    )
    return [
        "## RRHF against PPO",
        "",
        "All methods start from the base, ask the same prompts, are scored by the same reward "
        "model and sample the same number of responses. Offline RRHF ranks them together with the "
        "data's two replies, in two passes; the online methods sample from the policy as it is, in "
        "rollouts, and pass over each once. Settings were set beforehand and not tuned.",
        "",
        _outcomes(out, [OFFLINE, *methods]),
        "",
        _verdicts(out, methods),
        "",
        _costs(out, [OFFLINE, *methods]),
        "",
        f"![rewards and KL of the rollouts]({picture.name})",
        "",
    ]


def rollout_curve(out: Path, method: Method, metric: str) -> list[tuple[float, float]]:
    """(optimiser steps before it, value) of each rollout."""
    rollouts = _rollouts(out / method.folder)
    # Earlier runs have a rollout's metrics on the row of its first step, behind that step.
    return [(float(row["step"] - ("loss" in row)), float(row[metric])) for row in rollouts]


def _rollouts(run: Path) -> list[dict[str, Any]]:
    """What was logged of each rollout."""
    rows: dict[float, dict[str, Any]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("seconds_generate") is not None:
            rows.setdefault(row["rollout"], row)
    return [rows[number] for number in sorted(rows)]


def _outcomes(out: Path, methods: Sequence[Method]) -> str:
    base = load_row(out / "rows" / f"base{SAMPLES}.json")
    base_one = load_row(out / "rows" / "base.json")
    best = load_row(out / "rows" / "base_best_of_4.json")
    lines = [
        _outcome("base", base, base_one, None),
        _outcome("base, best of 4", best, best, base),
    ]
    for method in methods:
        several = load_row(out / "rows" / f"{method.row}{SAMPLES}.json")
        lines.append(
            _outcome(method.name, several, load_row(out / "rows" / f"{method.row}.json"), base)
        )
    headings = ["", "reward ↑", "Δ reward on base ↑", "win (reward) ↑", "KL nats"]
    table = markdown_lines([*headings, "ppl_reference ↓", "tokens"], lines)
    return (
        f"{table}\nReward and wins: four samples a prompt (best of 4: the one that was chosen); "
        "Δ is paired over prompts. KL, perplexity and tokens: one sample a prompt."
    )


def _outcome(
    name: str, rewards: Mapping[str, Any], other: Mapping[str, Any], base: Mapping[str, Any] | None
) -> list[str]:
    def cell(row: Mapping[str, Any], metric: str, digits: int = 2) -> str:
        return format_estimate(row["metrics"].get(metric), digits)

    gain = NOTHING if base is None else format_estimate(_gain(rewards, base), with_sign=True)
    return [
        name,
        cell(rewards, "reward"),
        gain,
        cell(rewards, "win_reward"),
        cell(other, "kl"),
        cell(other, "ppl_reference"),
        cell(other, "length", 1),
    ]


def _gain(row: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    both = [measure_from_json(one["per_prompt"]["reward"]) for one in (row, base)]
    found = paired_difference(both[0], both[1])
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _verdicts(out: Path, methods: Sequence[Method]) -> str:
    """Whether an online method's reward differs from offline RRHF's, by the paired interval."""
    offline = load_row(out / "rows" / f"{OFFLINE.row}{SAMPLES}.json")
    lines = []
    for method in methods:
        gain = _gain(load_row(out / "rows" / f"{method.row}{SAMPLES}.json"), offline)
        told = format_estimate(gain, with_sign=True)
        apart = gain["low"] > 0 or gain["high"] < 0
        verdict = "more" if gain["mean"] > 0 else "less"
        words = f"{verdict} reward than" if apart else "no reward that differs clearly from"
        lines.append(f"- {method.name}: {words} offline RRHF's ({told}).")
    return "\n".join(lines)


def _costs(out: Path, methods: Sequence[Method]) -> str:
    headings = ["", "sampled responses", "sampled tokens", "sequences trained on", "steps"]
    headings += ["models in memory", "seconds: sample", "score", "read", "rest"]
    lines = [_offline_cost(out) if m is OFFLINE else _online_cost(out, m) for m in methods]
    table = markdown_lines(headings, lines)
    return (
        f"{table}\nSequences count a response once for each pass; the critic's are not counted. "
        "Models: those that training holds at the same time (offline RRHF: sampling and scoring "
        "come before). `read`: log-probs of policy and reference, and values; `rest`: updates, "
        "loading, checkpoints. Offline, scoring is part of `sample`. The runs shared the machine "
        "with each other and with other work, so the seconds say where the time went, not how "
        "methods compare to the second."
    )


def _offline_cost(out: Path) -> list[str]:
    run = read_manifest(out / OFFLINE.folder) or {}
    config = _settings(out / OFFLINE.folder)
    candidates = read_manifest(out / "candidates" / "train_data.json") or {}
    sampled = candidates["input"]["manifest"]
    seconds = (out / "steps" / "3-candidates.seconds").read_text().strip()
    passes = run["data"]["candidates_used"] * config["num_train_epochs"]
    return [
        OFFLINE.name,
        str(sampled["samples"]),
        str(sampled["tokens"]),
        format_number(passes, 0),
        str(run["steps"]),
        "1 (policy)",
        seconds,
        NOTHING,
        NOTHING,
        format_number(run["seconds"], 0),
    ]


def _settings(run: Path) -> dict[str, Any]:
    """What a run was asked to do."""
    place = settings_file(run)
    assert place is not None, f"{run} is no run"
    settings: dict[str, Any] = json.loads(place.read_text())
    return settings


def _online_cost(out: Path, method: Method) -> list[str]:
    run = read_manifest(out / method.folder) or {}
    config = _settings(out / method.folder)
    rollouts = _rollouts(out / method.folder)
    phases = (("generate",), ("score",), ("read", "reference"))
    spent = [
        sum(row.get(f"seconds_{name}", 0.0) for row in rollouts for name in names)
        for names in phases
    ]
    total = float((out / "steps" / f"{method.step}.seconds").read_text())
    responses = run["data"]["responses"]["sampled"]
    length = statistics.fmean(row["response_length"] for row in rollouts)
    return [
        method.name,
        str(responses),
        format_number(responses * length, 0),
        format_number(responses * config["ppo_epochs"], 0),
        str(run["steps"]),
        _models(config),
        *(format_number(value, 0) for value in spent),
        format_number(total - sum(spent), 0),
    ]


def _models(config: Mapping[str, Any]) -> str:
    models = ["policy"]
    if not config["use_lora"]:
        models.append("reference")
    models.append("reward model")
    if METHODS[config["method"]].has_critic and not config["share_trunk"]:
        models.append("critic")
    return f"{len(models)} ({', '.join(models)})"
