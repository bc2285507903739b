"""Time and memory by phase: what is measured, how it is told, and whether it is documented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from offload_cases import offloading_on_a_cpu
from places import ROOT
from ppo_cases import build_world, save_demonstrations, settings
from trainer_cases import metrics_of

from rrhf.training.core import phases as phases_room
from rrhf.training.core.phases import (
    PeakMeter,
    Phases,
    Spent,
    as_metrics,
    as_table,
    over_ranks,
    peak_meter,
)
from rrhf.training.online import ppo

DOCUMENT = ROOT / "docs" / "ppo_metrics.md"


class FakeMeter:
    """Each phase peaks 1 MiB higher."""

    what = "a fake"

    def __init__(self) -> None:
        self.notes: list[str] = []

    def give_back(self) -> None:
        self.notes.append("give back")

    def forget(self) -> None:
        self.notes.append("forget")

    def peak_mib(self) -> float:
        return float(self.notes.count("forget"))


def test_a_phase_is_measured_even_if_it_fails() -> None:
    phases = Phases(FakeMeter())
    with phases("generate") as spent:
        spent.tokens = 7
    with pytest.raises(KeyError), phases("score"):
        raise KeyError
    assert phases.take().keys() == {"generate", "score"} and phases.take() == {}
    with phases("generate") as spent:
        spent.tokens = 3
    assert phases.take()["generate"].tokens == 3
    total = phases.total
    assert total["generate"].tokens == 10 and total["generate"].peak_mib == 3.0
    assert sum(one.seconds for one in total.values()) <= phases.seconds


def test_weights_move_only_where_a_phase_follows_another() -> None:
    moves: list[str] = []
    phases = Phases(FakeMeter(), moves.append)
    for name in ("train", "train", "generate", "train"):
        with phases(name):
            pass
    assert moves == ["train", "generate", "train"]
    assert "offload" in phases.total


def test_ranks_are_put_together() -> None:
    one = {"read": Spent(2.0, 10.0, 5)}
    two = {"read": Spent(1.0, 30.0, 6), "score": Spent(1.0, 1.0)}
    merged = over_ranks([one, two])
    assert merged == {"read": Spent(2.0, 30.0, 11), "score": Spent(1.0, 1.0)}
    assert one["read"].tokens == 5, "a rank's own stays as it is"
    row = as_metrics(merged)
    assert row["tokens_per_second_read"] == 5.5 and "tokens_per_second_score" not in row
    table = as_table(merged, 4.0, "a fake").splitlines()
    assert table[1].split() == ["read", "2.0", "50.0%", "30", "6"]
    assert table[3].split()[:4] == ["the", "rest", "1.0", "25.0%"] and "a fake" in table[4]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_the_resident_set_of_a_phase_is_its_own() -> None:
    meter = peak_meter(torch.device("cpu"))
    phases = Phases(meter)
    with phases("large"):
        held = torch.ones(32 << 20)
    del held
    with phases("small"):
        pass
    assert phases.total["large"].peak_mib - phases.total["small"].peak_mib > 100


def test_where_a_peak_cannot_be_forgotten_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases_room, "_FORGET", Path("/nowhere/clear_refs"))
    meter = peak_meter(torch.device("cpu"))
    assert type(meter) is PeakMeter and "cannot reset" in meter.what
    assert meter.peak_mib() > 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With everything on that writes a metric."""
    folder = tmp_path_factory.mktemp("run")
    world = build_world(folder)
    changes: dict[str, Any] = {"num_rollouts": 1, "ppo_epochs": 1, "offload_level": ["optimizer"]}
    changes |= {"kl_in": "loss", "entropy_coeff": 0.1, "dual_clip": 3.0}
    changes |= {"ptx_datasets": str(save_demonstrations(folder)), "ptx_coeff": 0.1}
    changes |= {"eval_datasets": str(world / "prompts.jsonl")}
    with offloading_on_a_cpu():
        ppo.train(settings(world, folder / "run", **changes))
    return folder / "run"


def test_every_metric_is_documented_and_there(run: Path) -> None:
    rows = metrics_of(run)
    written = {name for row in rows for name in row} - {"step"}
    phases = "generate|score|read|reference|train|offload|gather"
    written = {
        re.sub(rf"^(seconds|peak_mib|tokens_per_second)_({phases})$", r"\1_", name)
        for name in written
    }
    written = {re.sub("^eval_", "", name) for name in written}
    known = set()
    for name in re.findall(r"`([a-z_0-9<>]+)`", DOCUMENT.read_text()):
        known.add(name.replace("<phase>", ""))
    assert written <= known, sorted(written - known)
    asked = {"policy_loss", "value_loss", "ptx_loss", "reward", "score", "kl", "kl_k3", "ratio"}
    asked |= {"largest_ratio", "clip_share", "explained_variance", "entropy", "finished_fraction"}
    asked |= {f"response_length{which}" for which in ("", "_min", "_max")}
    asked |= {"seconds_", "peak_mib_", "tokens_per_second_", "tokens_per_second"}
    assert asked <= written


def test_a_rollouts_metrics_stand_once(run: Path) -> None:
    rows = metrics_of(run)
    (rollout,) = [row for row in rows if "score" in row]
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and rows[0] == rollout and rollout["step"] == 0
    assert rollout.keys() & steps[0].keys() == {
        "step",
        "rollout",
        "seconds_offload",
        "peak_mib_offload",
    }
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["last_rollout"]["score"] == rollout["score"]
    assert {"generate", "score", "read", "reference", "train"} <= manifest["phases"].keys()
    assert manifest["phases"]["train"]["tokens"] > 0
