"""The PPO benchmark: workers that stop between two pieces, and what it asks before it times."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import ppo_iteration
from benchmarks.harness import NotMeasured
from benchmarks.ppo_iteration import OURS, PEER, Case, compare
from benchmarks.workers import Worker

BUSY = """
import time
from benchmarks.workers import Gate

gate = Gate()
print("this is no answer")
for number in range(3):
    gate(number=number) if number else gate()
    time.sleep(0.05)
    end = time.process_time() + 0.1 * (number + 1)
    while time.process_time() < end:
        pass
gate(number=3)
raise ValueError("nothing is left")
"""


def test_a_worker_works_from_gate_to_gate() -> None:
    with Worker([sys.executable, "-c", BUSY]) as worker:
        for number in (1, 2, 3):
            found = worker.piece()
            assert found["number"] == number
            assert 0.1 * number <= found["seconds"] < 0.1 * number + 0.04
        with pytest.raises(RuntimeError, match="nothing is left"):
            worker.piece()


def facts() -> dict[str, float]:
    return {
        "optimizer_steps": 4,
        "kl": 1e-7,
        "ratio": 1.0001,
        "first_ratio": 1.0,
        "entropy": 10.39,
        "shortest_response": 64,
    }


def test_sides_that_do_not_do_the_same_are_not_timed() -> None:
    case = Case("separate")
    assert compare({PEER: facts(), OURS: facts()}, case)[OURS]["kl"] == 0
    for changes in (
        {"optimizer_steps": 5},
        {"kl": 0.01},
        {"ratio": 1.1},
        {"first_ratio": 1.001},
        {"entropy": 10.37},
        {"shortest_response": 63},
    ):
        with pytest.raises(AssertionError):
            compare({PEER: facts(), OURS: facts() | changes}, case)


def test_the_flop_ratio_by_hand() -> None:
    """H 8, one layer: 2*8*12 + 3*8*20 = 672 weights, head 8*10, 16 a pair; P 3, R 2, one epoch."""
    case = replace(
        Case("separate"), hidden=8, layers=1, vocabulary=10, prompt=3, response=2, epochs=1
    )
    whole = 5 * 672 + 25 * 16
    written = 1 * (672 + 80) + 80 + 2 * 4 * 16
    read = 5 * 672 + (4.5 + 6 + 2) * 16
    theirs = 3 * 672 + 9 * 16 + written + 3 * whole + 5 * 80 + 3 * (2 * whole + 5 * 80)
    start = 3 * 672 + 4.5 * 16 + written + 3 * read + 2 * 80
    assert case.theory() == pytest.approx(theirs / (start + 6 * read + 3 * 2 * 80))
    lora = replace(case, critic="LoRA")
    assert lora.theory() == pytest.approx(theirs / (start + 2 * read + 2 * 2 * 80))


def test_without_the_peer_nothing_is_measured() -> None:
    for python in ("no/such/python", sys.executable):
        with pytest.raises(NotMeasured, match=r"TRL 1\.10\.0 is wanted.*pip install trl==1\.10\.0"):
            ppo_iteration.run("lora", 1, python)


@pytest.mark.slow
@pytest.mark.parametrize("name", ppo_iteration.CASES)
def test_our_side(name: str, tmp_path: Path) -> None:
    case = ppo_iteration.CASES[name]
    tiny = replace(case, hidden=32, layers=2, vocabulary=64, prompt=6, response=4)
    command = [sys.executable, "-m", "benchmarks.ppo_rrhf"]
    world = str(ppo_iteration.write_world(tmp_path, tiny))
    with Worker([*command, world, json.dumps(asdict(tiny))]) as worker:
        first, second = worker.piece(), worker.piece()
    compare({PEER: facts() | {"entropy": first["entropy"]}, OURS: first}, tiny)
    assert second["optimizer_steps"] == 8
