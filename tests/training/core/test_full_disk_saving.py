"""A disk that fills up while a run saves: one message, nothing half-written, and it goes on."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import save_tiny
from trainer_cases import metrics_of, ranked_rows, same_weights, write_lines

from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.os_errors import FullDisk, explained_full_disk, full_disk
from rrhf.sealed_folders import damage_of
from rrhf.staged_folders import saved_folder
from rrhf.training.core.checkpoint_folders import checkpoints_by_step

torch.set_num_threads(1)

CHECKPOINT = 390_000
"""Bytes, about: the weights of the tiny model and twice as much for AdamW."""


def mount(place: Path, options: str) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own in memory, which may be given another size."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or not mount(place, "size=4m"):
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, data.jsonl, and straight/, a run of four steps."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    write_lines(folder / "data.jsonl", ranked_rows(6))
    assert main(words(folder, folder / "straight")) == 0
    return folder


def words(world: Path, run: Path, *flags: str) -> list[str]:
    model, data = str(world / "model"), str(world / "data.jsonl")
    given = ["train", "sft", "--model_name_or_path", model, "--data_path", data]
    given += ["--output_dir", str(run), "--max_steps", "4", "--save_steps", "1"]
    return [*given, "--model_max_length", "100", *flags]


def hidden(run: Path) -> list[str]:
    return [path.name for path in run.rglob(".*") if path.name != ".lock"]


def test_the_disk_and_the_need_are_named_and_the_run_goes_on(
    world: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Room for two checkpoints, but not for the third one beside them."""
    size = 2 * CHECKPOINT + 250_000
    assert mount(disk, f"remount,size={size}")
    run = disk / "run"
    assert main(words(world, run)) == 2
    told = capsys.readouterr().err
    found = re.search(
        r"error: (\S+): the disk is full: ([\d,]+) bytes needed, ([\d,]+) bytes free on the disk "
        r"mounted at (\S+); make room there and go on with --resume_from_checkpoint",
        told,
    )
    assert found is not None, told
    assert "Traceback" not in told and told.count("error:") == 1
    assert (found.group(1), found.group(4)) == (str(run / "checkpoints"), str(disk))
    needed, free = (int(found.group(place).replace(",", "")) for place in (2, 3))
    assert 0.9 * CHECKPOINT < needed < 1.1 * CHECKPOINT
    assert 100_000 < free < needed  # without what was staged
    assert not hidden(run)
    whole = checkpoints_by_step(run / "checkpoints")
    assert [path.name for path in whole] == ["step-1", "step-2"]
    assert [damage_of(path) for path in whole] == [None, None]
    assert mount(disk, "remount,size=4m")
    assert main(words(world, run, "--resume_from_checkpoint")) == 0
    assert same_weights(run / "policy", world / "straight" / "policy")
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4]


def test_a_disk_of_any_size_leaves_nothing_half_written(
    world: Path, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it fills up: settings, weights, optimiser, state, manifest, policy, tokenizer."""
    endings = set()
    for size in (4096, 20_000, 60_000, 140_000, 200_000, 400_000, 430_000, 860_000, 1_000_000):
        assert mount(disk, "remount,size=4m")
        for path in disk.iterdir():
            shutil.rmtree(path)
        assert mount(disk, f"remount,size={size}")
        code = main(words(world, disk / "run", "--save_total_limit", "1"))
        told = capsys.readouterr().err
        endings.add(code)
        if code:
            assert code == 2 and "Traceback" not in told, size
            assert re.search(r"the disk is full|no space left", told), (size, told)
        assert not hidden(disk), size
        for path in disk.rglob("step-*"):
            assert damage_of(path) is None, size
        policy = disk / "run" / "policy"
        assert (damage_of(policy) is None) == policy.exists(), size
        assert policy.exists() == (code == 0), size
    assert endings == {0, 2}


@pytest.mark.parametrize("limit", [60_000, 150_000])
def test_a_limit_of_the_size_of_files_is_told(
    limit: int, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the weights, which a library writes by itself, and in the optimiser, by torch."""
    run = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code = main(words(world, run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capsys.readouterr().err
    assert code == 2 and "Traceback" not in told
    assert "a file would pass the largest size allowed (ulimit -f, or the disk's own)" in told
    assert not hidden(run) and not checkpoints_by_step(run / "checkpoints")
    assert main(words(world, run, "--resume_from_checkpoint")) == 0
    assert same_weights(run / "policy", world / "straight" / "policy")


def test_an_older_model_stays_where_the_new_one_finds_no_room(tmp_path: Path) -> None:
    target = tmp_path / "policy"
    saved_folder(target, lambda staged: (staged / "weights").write_bytes(b"old") and None)

    def fill(staged: Path) -> None:
        (staged / "weights").write_bytes(b"half")
        with explained_full_disk(5_000):
            raise RuntimeError("writing failed: No space left on device (os error 28)")

    with pytest.raises(UserError, match="the disk is full: 5,000 bytes needed"):
        saved_folder(target, fill)
    assert (target / "weights").read_bytes() == b"old" and damage_of(target) is None
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    def fail(staged: Path) -> None:
        raise KeyError("no such weight")

    with pytest.raises(KeyError, match="no such weight"):
        saved_folder(tmp_path / "policy", fail)
    assert not list(tmp_path.iterdir())
    assert full_disk(KeyError("os error 28")) is None
    assert full_disk(RuntimeError("I/O error (os error 5)")) is None
    with pytest.raises(KeyError), explained_full_disk(3):
        raise KeyError("x")
    with pytest.raises(FullDisk) as told, explained_full_disk(3):
        raise OSError(28, "No space left on device")
    assert told.value.needed_bytes == 3 and full_disk(told.value) == "the disk is full"
