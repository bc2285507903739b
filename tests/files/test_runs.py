"""Run folders and metrics: whole or not there, one writer, cut back on resume."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rrhf.errors import UserError
from rrhf.manifests import read_manifest
from rrhf.metrics_log import MetricsLog
from rrhf.runs import RunFolder, describe_changes
from rrhf.sealed_folders import seal_folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# Metrics.


def test_metrics_are_there_at_once_and_hold_no_nan(tmp_path: Path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1, "loss": math.nan})
    assert rows_of(tmp_path / "m.jsonl") == [{"step": 1, "loss": None}]
    assert log.offset == (tmp_path / "m.jsonl").stat().st_size
    log.close()


def test_truncate_to_an_offset_forgets_what_came_after(tmp_path: Path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1})
    offset = log.offset
    log.append({"step": 2})
    log.truncate_to(offset)
    log.append({"step": 3})
    assert [row["step"] for row in rows_of(tmp_path / "m.jsonl")] == [1, 3]
    log.close()


def test_truncate_without_a_file_is_nothing(tmp_path: Path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.truncate_to(0)
    assert log.offset == 0
    assert not (tmp_path / "m.jsonl").exists()


def test_lost_metrics_are_said_not_filled_with_zeros(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.append({"step": 1})
    size = log.offset
    with caplog.at_level(logging.WARNING):
        log.truncate_to(size + 100)
    assert "some rows are lost" in caplog.text
    assert (tmp_path / "m.jsonl").stat().st_size == size


def test_metrics_cut_at_any_byte_go_on(tmp_path: Path):
    whole = b'{"step": 1}\n{"step": 2, "text": "\xc3\xa9"}\n'
    path = tmp_path / "m.jsonl"
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        log = MetricsLog(path)
        log.append({"step": 9})
        log.close()
        steps = [row["step"] for row in rows_of(path)]
        # A line counts once its object is whole, newline or not.
        expected = [1] * (cut >= 11) + [2] * (cut >= len(whole) - 1)
        assert steps == [*expected, 9], cut


# Run folders.


def test_a_run_folder_from_start_to_end(tmp_path: Path):
    run = RunFolder(tmp_path / "deep" / "run")
    run.open({"learning_rate": 1e-3, "model": Path("m")}, resume=False)
    assert json.loads((run.path / "settings.json").read_text())["model"] == "m"
    manifest = read_manifest(run.path)
    assert manifest is not None and manifest["status"] == "unfinished"
    assert run.checkpoints.is_dir()
    run.metrics.append({"step": 1})
    run.finish({"steps": 1})
    run.close()
    manifest = read_manifest(run.path)
    assert manifest is not None
    assert manifest["status"] == "complete" and manifest["steps"] == 1


def test_a_finished_run_is_not_overwritten(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.open({}, resume=False)
    run.finish({})
    run.close()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"a finished run.*--resume_from_checkpoint.*--output_dir"):
        RunFolder(tmp_path).open({}, resume=False)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "left", ["settings.json", "config.json", "metrics.jsonl", "checkpoints/step-1/x"]
)
def test_what_a_killed_run_left_is_not_overwritten(tmp_path: Path, left: str):
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text('{"output_dir": "run"}\n')
    with pytest.raises(UserError, match="an unfinished run"):
        RunFolder(tmp_path).open({}, resume=False)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", '{"name": "my web app"}'),
        ("manifest.json", '{"status": "fine"}'),
        ("settings.json", '{"editor": "mine"}'),
        ("settings.json", "// of another program"),
        ("settings.json", "[]"),
    ],
)
def test_files_of_other_programs_are_left_alone(
    tmp_path: Path, name: str, text: str, resume: bool
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: .* choose another --output_dir"):
        RunFolder(tmp_path).open({"output_dir": str(tmp_path)}, resume)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, text)]
    if not resume:
        with pytest.raises(UserError, match=rf"{name}: .* choose another --output_dir"):
            RunFolder(tmp_path).require_free()


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_folder_is_no_run(tmp_path: Path, resume: bool):
    """The folder of a run's model: resuming there would write over what vouches for the model."""
    policy = tmp_path / "policy"
    policy.mkdir()
    (policy / "config.json").write_text('{"model_type": "llama"}')
    seal_folder(policy)
    before = {path.name: path.read_bytes() for path in policy.iterdir()}
    with pytest.raises(UserError, match=r"policy: holds a model.*name the run's own folder"):
        RunFolder(policy).open({"output_dir": "x"}, resume=resume)
    assert {path.name: path.read_bytes() for path in policy.iterdir()} == before


def test_other_files_in_the_folder_are_no_run(tmp_path: Path):
    (tmp_path / "train_data.json").write_text("{}")
    run = RunFolder(tmp_path)
    run.open({}, resume=False)
    run.close()


def test_resume_says_what_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = RunFolder(tmp_path)
    run.open({"learning_rate": 1e-3, "seed": 1}, resume=False)
    run.close()
    again = RunFolder(tmp_path)
    with caplog.at_level(logging.WARNING):
        again.open({"learning_rate": 1e-4, "seed": 1}, resume=True)
    again.close()
    assert "learning_rate = 0.0001, which was 0.001" in caplog.text
    assert "seed" not in caplog.text


def test_a_resumed_run_counts_as_unfinished(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.open({}, resume=False)
    run.finish({})
    run.close()
    run.open({}, resume=True)
    manifest = read_manifest(tmp_path)
    assert manifest is not None and manifest["status"] == "unfinished"
    run.close()


def test_a_finished_run_is_known_by_its_settings(tmp_path: Path):
    settings = {
        "output_dir": "here",
        "resume_from_checkpoint": False,
        "seed": 1,
        "model": Path("m"),
    }
    run = RunFolder(tmp_path)
    assert RunFolder(tmp_path / "nothing").finished_model(settings) is None
    run.open(settings, resume=False)
    assert run.finished_model(settings) is None
    run.policy.mkdir()
    run.finish({"model_folder": "policy"})
    run.close()
    again = {**settings, "output_dir": "./here", "resume_from_checkpoint": True}
    assert run.finished_model(again) == tmp_path / "policy"
    with pytest.raises(UserError, match=r"other settings:\n  seed was 1 and is 2\n.*--output_dir"):
        run.finished_model({**again, "seed": 2})
    run.policy.rmdir()  # the last checkpoint can make it again
    assert run.finished_model(again) is None


def test_a_finished_run_remembers_that_it_had_checkpoints(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open({}, resume=False)
    run.note_checkpoint()
    run.finish({})
    run.close()
    run.open({}, resume=True)
    with pytest.raises(UserError, match="none is left"):
        run.require_no_lost_checkpoints()
    run.drop_checkpoints()  # on purpose: not lost
    run.require_no_lost_checkpoints()
    assert not run.checkpoints.exists()
    run.close()


def test_resume_of_nothing_begins(tmp_path: Path):
    run = RunFolder(tmp_path / "new")
    run.open({}, resume=True)
    run.close()


def test_a_file_in_the_folders_place(tmp_path: Path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="choose another path"):
        RunFolder(tmp_path / "run").open({}, resume=False)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Root may write anywhere, so the file system's refusal is played.
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        RunFolder(tmp_path / "run").open({}, resume=False)


def test_closing_frees_the_folder_though_a_worker_lives(tmp_path: Path):
    run = RunFolder(tmp_path)
    run.open({}, resume=False)
    worker = os.fork()
    if worker == 0:
        time.sleep(30)
        os._exit(0)
    try:
        run.close()
        run.open({}, resume=True)
        run.close()
    finally:
        os.kill(worker, 9)
        os.waitpid(worker, 0)


HOLDER = """
import sys, time
from rrhf.runs import RunFolder
run = RunFolder(sys.argv[1])
run.open({}, resume=False)
print("held", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path):
    import socket

    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        began = time.monotonic()
        with pytest.raises(UserError) as caught:
            RunFolder(tmp_path).open({}, resume=True)
        assert time.monotonic() - began < 300, "it waited for the holder"
        assert f"process {holder.pid} on host {socket.gethostname()}" in str(caught.value)
    finally:
        holder.kill()
        holder.wait()
    run = RunFolder(tmp_path)  # the lock ended with its process
    run.open({}, resume=True)
    run.close()


def test_of_many_changed_settings_the_first_are_told() -> None:
    changed = [(f"setting_{number}", number, None) for number in range(12)]
    lines = describe_changes(changed).splitlines()
    assert lines[0] == "  setting_0 was 0 and is None" and len(lines) == 11
    assert "and 2 more" in lines[-1]
    assert describe_changes(changed[:1]) == "  setting_0 was 0 and is None"


def test_how_long_ranks_wait_is_no_setting_of_a_run(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open({"a": 1}, resume=False)
    run.policy.mkdir()
    run.finish({"model_folder": "policy"})
    run.close()
    assert RunFolder(tmp_path).finished_model({"a": 1, "ddp_timeout": 5.0}) == run.policy
