"""Samples of what the policy writes: which, when, where to, and exactly resumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import build_world, settings
from rollout_cases import hand_made_rows

from rrhf.data.candidate_files import read_candidate_sets
from rrhf.metrics_log import MetricsLog
from rrhf.training.core import tracking
from rrhf.training.core.tracking import Tracker, as_markdown
from rrhf.training.online import ppo
from rrhf.training.online.experience import build_experience
from rrhf.training.online.listeners import MadeRollout
from rrhf.training.online.sample_table import SampleTable, as_text

OPTIMIZER = torch.optim.SGD([torch.zeros(1)])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def table_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_each_rollout_and_each_evaluation_shows_a_few(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    held_out = {"eval_datasets": str(world / "prompts.jsonl"), "eval_steps": 4}
    ppo.train(settings(world, run, num_return_sequences=2, sample_table_rows=3, **held_out))
    rows = table_of(run)
    places = [(row["step"], row["source"]) for row in rows]
    expected = [(0, "rollout"), (4, "evaluation"), (4, "rollout"), (8, "evaluation")]
    assert places == [place for place in expected for _ in range(3)]
    queries = [s.query for s in read_candidate_sets(world / "prompts.jsonl")]
    assert all(row["prompt"] in queries and row["tokens"] > 0 for row in rows)
    one, two = (
        [r["prompt"] for r in rows if r["source"] == "evaluation" and r["step"] == step]
        for step in (4, 8)
    )
    assert one == two == queries[:3]
    for row in rows:
        assert row["reward"] == pytest.approx(row["score"] - 0.05 * row["kl"], abs=1e-3)
        assert row["finish"] in ("stop", "length")
        assert isinstance(row["response"], str)


@pytest.mark.parametrize(
    ("every", "shown"), [(1, [0, 3, 4, 9]), (4, [0, 4, 9]), (5, [0, 9]), (100, [0]), (0, [])]
)
def test_at_most_one_table_in_so_many_steps(
    world: Path, tmp_path: Path, every: int, shown: list[int]
) -> None:
    log = MetricsLog(tmp_path / "samples.jsonl")
    table = SampleTable(log, every, 1, is_terminal=False)
    for step in (0, 3, 4, 9):
        show(world, table, step)
    log.close()
    assert [row["step"] for row in (table_of(tmp_path) if every else [])] == shown


def show(world: Path, table: SampleTable, step: int) -> None:
    rows = hand_made_rows()
    experience = build_experience(rows, settings(world, "unused", method="reinforce_pp"), 0.1)
    prompts = list(read_candidate_sets(world / "prompts.jsonl"))
    table.see_rollout(MadeRollout(step, step, prompts, rows, experience, {}))


def test_a_checkpoint_knows_where_the_table_was(world: Path, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "samples.jsonl")
    table = SampleTable(log, 5, 2, is_terminal=False)
    show(world, table, 0)
    state = json.loads(json.dumps(table.state_dict()))
    known = (tmp_path / "samples.jsonl").read_bytes()
    show(world, table, 6)
    log.close()
    again = SampleTable(MetricsLog(tmp_path / "samples.jsonl"), 5, 2, is_terminal=False)
    again.load_state_dict(state)
    assert (tmp_path / "samples.jsonl").read_bytes() == known
    show(world, again, 4)  # within the five steps that have their table
    assert (tmp_path / "samples.jsonl").read_bytes() == known
    again.load_state_dict({})
    assert (tmp_path / "samples.jsonl").read_bytes() == b""
    show(world, again, 0)
    assert (tmp_path / "samples.jsonl").read_bytes() == known


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_a_short_table(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, is_terminal: bool
) -> None:
    table = SampleTable(MetricsLog(tmp_path / "samples.jsonl"), 1, 2, is_terminal)
    with caplog.at_level(logging.INFO):
        show(world, table, 0)
    assert ("finish" in caplog.text) is is_terminal
    row = {
        "prompt": "p" * 300 + " end?",
        "response": "First\nline " + "r" * 300,
        "score": 1.0,
        "kl": 0.25,
        "finish": "stop",
    }
    lines = as_text([row], 100).splitlines()
    assert len(lines) == 2 and all(len(line) <= 100 for line in lines)
    assert "end?" in lines[1] and "First line" in lines[1] and "0.25" in lines[1]


def test_a_tracker_gets_texts_until_it_fails(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent: list[Any] = []

    def take(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        sent.append((name, list(columns), rows, step))
        if step:
            raise OSError("no network")

    table = SampleTable(MetricsLog(tmp_path / "samples.jsonl"), 1, 2, is_terminal=False)
    table.begin(Tracker(log_table=take), OPTIMIZER)
    for step in (0, 1, 2):
        show(world, table, step)
    (name, columns, rows, _), _ = sent
    assert name == "samples_rollout" and columns[:3] == ["prompt", "response", "score"]
    assert len(rows) == 2 and rows[0][2] == 1.0
    assert "no network" in caplog.text
    text = as_markdown(["a", "b"], [["x|y\nz", 0.123456]])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y<br>z | 0.1235 |"]


class Recorder:
    """In the place of a tracker's package: notes what is called, with what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, (args, kwargs)))
            return self if name in ("SummaryWriter", "Table") else None

        return called

    def of(self, name: str) -> list[Any]:
        return [arguments for called, arguments in self.calls if called == name]


def rows_to(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report_to: Any
) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(tracking, "_import", lambda module, package: recorder)
    config = settings(world, tmp_path, report_to=report_to)
    table = SampleTable(MetricsLog(tmp_path / "samples.jsonl"), 1, 2, is_terminal=False)
    table.begin(tracking.build_tracker(config, tmp_path, is_main=True), OPTIMIZER)
    show(world, table, 3)
    return recorder


def test_tensorboard_gets_a_text_and_wandb_a_table(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ((name, text, step), _), *others = rows_to(world, tmp_path, monkeypatch, "tensorboard").of(
        "add_text"
    )
    assert (name, step, others) == ("samples_rollout", 3, [])
    assert text.startswith("| prompt | response | score |") and len(text.splitlines()) == 4
    recorder = rows_to(world, tmp_path, monkeypatch, "wandb")
    ((_, table),) = recorder.of("Table")
    assert table["columns"][0] == "prompt" and len(table["data"]) == 2
    ((_, place),) = recorder.of("log")
    assert place == {"step": 3}
    assert not rows_to(world, tmp_path, monkeypatch, "trackio").of("log")
