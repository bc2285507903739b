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
from test_scripts import is_gone

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
