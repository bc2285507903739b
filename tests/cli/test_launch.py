"""Ranks under a launcher: their exit codes become one, signals reach them once, none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kills import child_environment
from places import TESTS
from ppo_cases import build_world
from processes import is_gone

from rrhf.cli import launch
from rrhf.errors import EXIT_FAULT

RANK = """
import os, signal, sys, time
from pathlib import Path
from rrhf.process_end import run_process
from rrhf.signals import Interrupted, caught_signals, sigterm_interrupts

place = Path(sys.argv[1])
rank = os.environ["RANK"]

def work():
    behaviour = sys.argv[2].split(",")[int(rank)]
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "stopped":
        (place / rank).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    if behaviour.isdigit():
        return int(behaviour)
    with sigterm_interrupts(), caught_signals() as stop:
        (place / f"{rank}.new").write_text(str(os.getpid()))
        (place / f"{rank}.new").rename(place / rank)
        while stop.received is None:
            time.sleep(0.01)
        (place / f"saving-{rank}").touch()
        time.sleep(1)  # a checkpoint; whoever ends the ranks may say so again
        (place / f"saved-{rank}").touch()
    return stop.exit_code

run_process(work)
"""
LIKE_TORCHRUN = """
import os, signal, subprocess, sys
received = []
def hand_on(number, frame):
    received.append(number)
    for rank in ranks:
        rank.send_signal(number)
signal.signal(signal.SIGTERM, hand_on)
signal.signal(signal.SIGINT, hand_on)
ranks = [
    subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True,
                     env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"})
    for rank in range(2)
]
codes = [rank.wait() for rank in ranks]
for rank in ranks:
    if received:  # once more, as an agent does that finds a rank ended
        rank.send_signal(signal.SIGTERM)
sys.exit(1 if received or any(codes) else 0)
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "launcher.py").write_text(LIKE_TORCHRUN)
    return tmp_path


def start(
    place: Path, behaviour: str, launcher: list[str] | None = None
) -> subprocess.Popen[bytes]:
    launcher = launcher or [str(place / "launcher.py")]
    words = [sys.executable, *launcher, str(place / "rank.py"), str(place), behaviour]
    return subprocess.Popen(
        [sys.executable, "-m", "rrhf.cli.launch", *words],
        env=child_environment(),
        start_new_session=True,
    )


def pids_of_waiting(place: Path, process: subprocess.Popen[bytes]) -> list[int]:
    """Once both ranks wait for their signal."""
    while not all((place / rank).exists() for rank in "01"):
        assert process.poll() is None
        time.sleep(0.02)
    return [int((place / rank).read_text()) for rank in "01"]


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ("0,0", 0),
        ("2,2", 2),
        ("2,75", 2),
        ("0,1", 1),
        ("75,75", 75),
        ("130,75", 130),
        ("killed,75", 1),
        ("2,killed", 2),
    ],
)
def test_many_codes_become_one(place: Path, behaviour: str, code: int) -> None:
    found = start(place, behaviour).wait(540)
    if behaviour == "130,75":
        assert found in (75, 130)
    else:
        assert found == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_ranks_and_they_save(place: Path, number: int, code: int) -> None:
    process = start(place, "wait,wait")
    ranks = pids_of_waiting(place, process)
    process.send_signal(number)
    assert process.wait(540) == code
    assert all((place / f"saved-{rank}").exists() for rank in "01")
    assert all(is_gone(pid) for pid in ranks)


def test_a_second_signal_waits_for_nobody(place: Path) -> None:
    process = start(place, "wait,wait")
    ranks = pids_of_waiting(place, process)
    for rank in ranks:
        os.kill(rank, signal.SIGSTOP)  # it will never save
    process.terminate()
    time.sleep(0.2)
    process.terminate()
    assert process.wait(540) == EXIT_FAULT
    assert all(is_gone(pid) for pid in ranks)


def test_ranks_whose_launcher_was_killed_do_not_stay(place: Path) -> None:
    process = start(place, "wait,wait")
    ranks = pids_of_waiting(place, process)
    (launcher,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(launcher), signal.SIGKILL)
    assert process.wait(540) == 75
    assert all((place / f"saved-{rank}").exists() for rank in "01")
    assert all(is_gone(pid) for pid in ranks)


def test_torchrun_is_such_a_launcher(place: Path) -> None:
    process = start(
        place,
        "wait,wait",
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    )
    ranks = pids_of_waiting(place, process)
    process.terminate()
    assert process.wait(540) == 75
    assert all((place / f"saved-{rank}").exists() for rank in "01")
    assert all(is_gone(pid) for pid in ranks)


def test_no_such_launcher_and_none_at_all(place: Path) -> None:
    for words, message in ((["nobody-has-this"], b"no such command"), ([], b"usage: ")):
        done = subprocess.run(
            [sys.executable, "-m", "rrhf.cli.launch", *words],
            env=child_environment(),
            capture_output=True,
        )
        assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("how", "seconds"),
    [("stops", "2"), pytest.param("ends", "300", marks=pytest.mark.slow)],
)
def test_a_rank_that_does_not_answer_is_given_up(how: str, seconds: str, tmp_path: Path) -> None:
    """One that stopped, after `ddp_timeout`; one that ended, at once."""
    with (tmp_path / "told").open("w") as told:
        process = subprocess.Popen(
            [sys.executable, str(TESTS / "lost_rank.py"), how, seconds],
            cwd=tmp_path,
            env=child_environment() | {"CUDA_VISIBLE_DEVICES": ""},
            stderr=told,
        )
        assert process.wait(250) == 1, (tmp_path / "told").read_text()
    if how == "stops":
        os.kill(int((tmp_path / "second").read_text()), signal.SIGKILL)
    message = (tmp_path / "told").read_text()
    assert f"has not answered for {seconds} s (--ddp_timeout)" in message
    assert "Traceback" not in message


def test_a_failed_rank_takes_one_along_that_hears_no_signal(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "FAILED_SECONDS", 0.5)
    monkeypatch.setenv("PYTHONPATH", child_environment()["PYTHONPATH"])
    words = [sys.executable, str(place / "launcher.py"), str(place / "rank.py"), str(place)]
    assert launch.launch([*words, "1,stopped"]) == 1
    assert is_gone(int((place / "1").read_text()))


@pytest.mark.slow
def test_a_stopped_rank_ends_a_training_within_the_stated_time(tmp_path: Path) -> None:
    """The whole command: its scorer stops the second rank for good."""
    world = build_world(tmp_path / "world")
    (tmp_path / "stops.py").write_text(
        "import os, signal\n"
        "def score(p, r, m):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    return [0.0] * len(r)\n"
    )
    words = [sys.executable, "-m", "rrhf.cli.launch", sys.executable, "-m", "torch.distributed.run"]
    words += ["--standalone", "--nproc_per_node", "2", "-m", "rrhf.cli.main", "train", "ppo"]
    words += ["--model_name_or_path", str(world / "model"), "--share_trunk"]
    words += ["--train_datasets", str(world / "prompts.jsonl"), "--rollout_size", "6"]
    words += ["--reward_model_name_or_path", "function:stops:score", "--max_new_tokens", "4"]
    words += ["--model_max_length", "100", "--output_dir", "run", "--ddp_timeout", "5"]
    environment = child_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("the ranks have ended with exit code 1;")
    assert "error: rank 0: another rank has ended, or has not answered for 5 s" in done.stderr
