"""Costs are read from what stages leave behind; the folders here are written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rrhf.files import write_json
from rrhf.manifests import write_manifest
from rrhf.report.training_cost import TrainingCost, cost_of, mean_cost


def stage(folder: Path, seconds: float) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "stage.json", {"cpu_seconds": seconds})
    return folder


def trained(folder: Path, seconds: float, **manifest: Any) -> Path:
    write_manifest(stage(folder, seconds), {"status": "complete", **manifest})
    return folder


def test_a_round_of_offline_ranking(tmp_path: Path) -> None:
    drawn = stage(tmp_path / "round-1", 5.0)
    (drawn / "candidates.jsonl").touch()
    write_manifest(
        drawn / "candidates.jsonl", {"status": "complete", "samples": 2000, "tokens": 50_000}
    )
    ranked = trained(tmp_path / "rrhf", 10.0, stage="rank", tokens=200_000, data={"prompts": 9})
    found = cost_of([drawn, ranked], "stage.json")
    assert found == TrainingCost(2000, 50_000, 200_000, 15.0, 1)
    twice = cost_of([drawn, ranked, ranked], "stage.json")
    assert (twice.trained_tokens, twice.networks) == (400_000, 1)


def test_an_online_method_counts_each_rollout_once_and_the_critic_too(tmp_path: Path) -> None:
    """Two rollouts of 10 responses, 4 and 6 tokens long on average; steps have their own means.

    A method of the user's own has a critic where its run leaves one.
    """
    costs = {}
    for method in ("ppo", "rloo", "mine:METHOD"):
        if method != "rloo":
            (tmp_path / method / "value").mkdir(parents=True)
        run = trained(
            tmp_path / method,
            7.0,
            stage="ppo",
            method=method,
            tokens=1000,
            data={"responses": {"sampled": 20}},
        )
        rows = [
            {"step": 0, "rollout": 0, "score": 0.1, "response_length": 4.0},
            {"step": 1, "rollout": 0, "response_length": 9.0},
            {"step": 2, "rollout": 1, "score": 0.2, "response_length": 6.0},
            {"step": 3, "rollout": 1, "response_length": 9.0},
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        costs[method] = cost_of([run], "stage.json")
    assert costs["ppo"] == costs["mine:METHOD"] == TrainingCost(20, 100.0, 2000, 7.0, 4)
    assert costs["rloo"] == TrainingCost(20, 100.0, 1000, 7.0, 3)


def test_nothing_costs_nothing_and_seeds_are_averaged() -> None:
    assert cost_of([], "stage.json") == TrainingCost()
    mean = mean_cost([TrainingCost(2, 4, 6, 8, 1), TrainingCost(4, 8, 10, 12, 1)])
    assert mean == TrainingCost(3, 6, 8, 10, 1)
