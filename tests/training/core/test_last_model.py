"""Between the last step and the finished model nothing that was trained is lost."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from best_job import keeper
from tiny import save_tiny
from trainer_cases import metrics_of, ranked_rows, same_weights, write_lines

from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.manifests import read_manifest
from rrhf.staged_folders import saved_folder
from rrhf.training.core import best, loop, model_folders
from rrhf.training.methods import sft

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def straight(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, nothing between them."""
    folder = tmp_path_factory.mktemp("straight")
    assert main(words(model, folder)) == 0
    return folder / "run" / "policy"


def words(model: str, folder: Path) -> list[str]:
    data = write_lines(folder / "data.jsonl", ranked_rows(6))
    given = ["train", "sft", "--model_name_or_path", model, "--data_path", str(data)]
    given += ["--output_dir", str(folder / "run"), "--model_max_length", "100"]
    return [*given, "--max_steps", "4"]


def stopping_before(work: Callable[..., Any]) -> Callable[..., Any]:
    def stopped(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return work(*args, **named)

    return stopped


@pytest.mark.parametrize(
    ("place", "name"),
    [(sft, "finish_run"), (model_folders, "saved_folder")],
    ids=["before it is begun", "while it is written"],
)
def test_a_signal_waits_for_the_model(
    place: Any,
    name: str,
    model: str,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(place, name, stopping_before(getattr(place, name)))
    assert main(words(model, tmp_path)) == 75
    run = tmp_path / "run"
    assert f"the run is finished; its model is in {run / 'policy'}" in capsys.readouterr().err
    assert (read_manifest(run) or {})["status"] == "complete"
    assert same_weights(run / "policy", straight)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert main([*words(model, tmp_path), "--resume_from_checkpoint"]) == 0
    assert len(metrics_of(run)) == 4


def test_where_the_model_cannot_be_written_its_step_is_kept(
    model: str,
    straight: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that is full for the model alone; resuming does no step again."""

    def full(target: Path, write: Callable[[Path], None]) -> None:
        def fail(staged: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(staged))

        saved_folder(target, fail)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(model_folders, "saved_folder", full)
        assert main(words(model, tmp_path)) == 2
    assert "bytes free on the disk" in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-4"]
    assert not (run / "policy").exists()
    monkeypatch.setattr(loop, "Update", no_update(loop.Update))
    assert main([*words(model, tmp_path), "--resume_from_checkpoint"]) == 0
    assert same_weights(run / "policy", straight)
    assert len(metrics_of(run)) == 4


def test_where_the_best_cannot_be_copied_the_last_step_is_kept(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A disk that is full for the second copy of the model."""

    def full(source: Path, target: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    run = tmp_path / "run"
    given = [*words(model, tmp_path), "--load_best_model_at_end", "true", "--eval_steps", "2"]
    given += ["--eval_data_path", str(tmp_path / "data.jsonl"), "--save_policy_steps", "2"]
    with monkeypatch.context() as patched:
        patched.setattr(best.shutil, "copytree", full)
        assert main(given) == 2
    assert "bytes free on the disk" in capsys.readouterr().err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-4"]
    assert (read_manifest(run) or {})["status"] == "unfinished"
    monkeypatch.setattr(loop, "Update", no_update(loop.Update))
    assert main([*given, "--resume_from_checkpoint"]) == 0
    manifest = read_manifest(run) or {}
    assert manifest["model_is"] == "best"
    step = manifest["best"]["step"]
    assert same_weights(run / "policy", run / "policies" / f"step-{step:06d}")


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_hears_that_the_best_could_not_be_copied(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path, **_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    kept = keeper(tmp_path)
    kept.judge(1, {"loss": 1.0})
    monkeypatch.setattr(kept._parallel, "rank", rank)
    monkeypatch.setattr(kept._parallel, "any", lambda flag: True)
    monkeypatch.setattr(best.shutil, "copytree", full)
    with pytest.raises(UserError, match="bytes free" if rank == 0 else "process 0 could not"):
        kept.copy_to(tmp_path)


def no_update(kind: type) -> type:
    class Fails(kind):  # type: ignore[misc]
        def __call__(self, *args: Any) -> Any:
            raise AssertionError("a step is done again")

    return Fails
