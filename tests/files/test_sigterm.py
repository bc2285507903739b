"""SIGTERM at any moment of a command: exit code 75, one line, nobody and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kills import child_environment
from places import TESTS
from processes import is_gone
from tiny import save_tiny
from trainer_cases import ranked_rows, write_lines

from rrhf.cli.main import main
from rrhf.evaluation.metrics import reward
from rrhf.signals import Interrupted, caught_signals, sigterm_interrupts

COMMANDS = {
    "evaluate": "--model_name_or_path {world}/model --prompts {world}/data.jsonl "
    "--scorer gold:help_desk --output_dir {out}/rows",
    "demo": "--size smoke --output_dir {out}/demo",
    "train rank": "--model_name_or_path {world}/model --data_path {world}/data.jsonl "
    "--model_max_length 100 --output_dir {out}/run",
    "train ppo": "--model_name_or_path {world}/model --train_datasets {world}/data.jsonl "
    "--model_max_length 100 --max_new_tokens 4 --output_dir {out}/run --share_trunk "
    "--reward_model_name_or_path gold:help_desk",
    "generate": "--model_name_or_path {world}/model --prompts {world}/data.jsonl "
    "--output_file {out}/out.jsonl",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = tmp_path_factory.mktemp("world")
    save_tiny(world / "model")
    write_lines(world / "data.jsonl", ranked_rows(6))
    return world


def start(command: str, world: Path, out: Path) -> subprocess.Popen[str]:
    words = [*command.split(), *COMMANDS[command].format(world=world, out=out).split()]
    return subprocess.Popen(
        [sys.executable, "-m", "rrhf.cli.main", *words],
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_until(process: subprocess.Popen[str], has_come: Any) -> None:
    while not has_come(Path(f"/proc/{process.pid}")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


def catches_sigterm(proc: Path) -> bool:
    (line,) = [line for line in (proc / "status").read_text().splitlines() if "SigCgt" in line]
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def loads_torch(proc: Path) -> bool:
    return "libtorch_python" in (proc / "maps").read_text()


def assert_stopped(process: subprocess.Popen[str]) -> None:
    told = process.communicate(timeout=540)[1]
    assert process.returncode == 75, told
    assert told.splitlines()[-1].startswith("stopped: SIGTERM came"), told
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "command",
    ["evaluate", "demo", "train rank"]
    + [pytest.param(other, marks=pytest.mark.slow) for other in ("train ppo", "generate")],
)
def test_while_torch_is_imported(command: str, world: Path, tmp_path: Path) -> None:
    process = start(command, world, tmp_path)
    wait_until(process, loads_torch)
    process.terminate()
    assert_stopped(process)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("command", ["evaluate", "demo"])
def test_from_the_first_moment_on(command: str, world: Path, tmp_path: Path) -> None:
    process = start(command, world, tmp_path)
    wait_until(process, catches_sigterm)
    process.terminate()
    assert_stopped(process)


SEEDS = """
import sys, time
from rrhf.errors import StoppedBySignal
from rrhf.signals import Interrupted, sigterm_interrupts
from rrhf.studies.seeds import run_seeds

def sleep(seed, say):
    time.sleep(600)

if __name__ == "__main__":
    try:
        with sigterm_interrupts():
            run_seeds(sleep, [0, 1], 2, print)
    except (Interrupted, StoppedBySignal):
        sys.exit(75)
"""


def test_seeds_side_by_side_end_together(tmp_path: Path) -> None:
    (tmp_path / "seeds.py").write_text(SEEDS)
    process = subprocess.Popen([sys.executable, "seeds.py"], cwd=tmp_path, env=child_environment())

    def workers(proc: Path) -> list[int]:
        children = (proc / "task" / proc.name / "children").read_text().split()
        return [int(pid) for pid in children]

    wait_until(process, lambda proc: len(workers(proc)) >= 3)  # two, and multiprocessing's tracker
    children = workers(Path(f"/proc/{process.pid}"))
    process.terminate()
    assert process.wait(540) == 75
    assert all(is_gone(pid) for pid in children)


def test_an_evaluation_leaves_nothing_half_written(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal was not answered")

    monkeypatch.setattr(reward, "mean_measure", signalled)
    before = signal.getsignal(signal.SIGTERM)
    (tmp_path / "length.py").write_text("def score(p, r, m):\n    return [len(x) for x in r]\n")
    monkeypatch.chdir(tmp_path)
    words = COMMANDS["evaluate"].format(world=world, out=tmp_path).split()
    words[words.index("gold:help_desk")] = "function:length:score"
    words += ["--max_new_tokens", "4", "--num_prompts", "3"]
    assert main(["evaluate", *words]) == 75
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: SIGTERM came")
    assert not [path for path in tmp_path.glob("rows/*")]
    assert signal.getsignal(signal.SIGTERM) == before


def test_where_python_would_swallow_it_the_process_ends(tmp_path: Path) -> None:
    program = """
import os, signal, weakref
from rrhf.signals import sigterm_interrupts

class Thing: pass

thing = Thing()
with sigterm_interrupts():
    kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del thing
    print("still here")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (75, "")


def test_a_second_signal_within_a_safe_place_is_not_held() -> None:
    with sigterm_interrupts():
        ours = signal.getsignal(signal.SIGTERM)
        with caught_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == ours


def test_a_second_signal_to_a_rank_is_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with sigterm_interrupts():
        with caught_signals() as stop:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert stop.received == signal.SIGTERM
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_the_tests_themselves_end_so(tmp_path: Path) -> None:
    """While a module is imported; test.sh becomes this process."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "test_long.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."],
        cwd=tmp_path,
        env=child_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.wait(540) == 75
