"""The benchmarks measure what they say: an honest baseline, and variants that compute the same."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import harness, rrhf_step, shapes
from benchmarks.original_step import OriginalStyle
from benchmarks.shapes import Shape
from rrhf.data.collate import EncodedSet, collate
from rrhf.models.logprobs import Policy

ROOT = Path(__file__).resolve().parents[1]
TINY = Shape(32, 2, 64, 9, (5, 3, 6), 1.0)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)


def test_the_original_style_gives_the_same_log_probs() -> None:
    batch = collate([EncodedSet([5, 6, 7], [[8, 9, 1], [3]]), EncodedSet([9], [[4, 1]])], pad_id=0)
    model = TINY.model()
    with torch.no_grad():
        assert torch.allclose(
            OriginalStyle(model)(batch).logprobs, Policy(model)(batch).logprobs, atol=1e-5
        )


def test_every_pair_is_violated() -> None:
    batch = rrhf_step.every_pair_violated(TINY)
    with torch.no_grad():
        logprobs = Policy(TINY.model().eval())(batch).logprobs
    means = logprobs.sum(1) / batch.response_lengths
    assert batch.scores is not None
    assert means.argsort().tolist() == batch.scores.argsort(descending=True).tolist()


def test_a_step_is_compared_before_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = rrhf_step.run("tiny", list(rrhf_step.VARIANTS), 1)
    assert "shared_prefix_checkpointed" in rrhf_step.table(result)
    warm = rrhf_step.Variant(lambda shape: Policy(shape.model(), temperature=1.001))
    monkeypatch.setitem(rrhf_step.VARIANTS, "wrong", warm)
    monkeypatch.setattr(rrhf_step, "timed", None)
    with pytest.raises(AssertionError, match="wrong differs"):
        rrhf_step.run("tiny", ["wrong"], 1)


def test_the_flop_ratio_by_hand() -> None:
    """One layer, H 8, so G 4, MLP 20: 2*8*12 + 3*8*20 = 672 weights; head 8*10; P 3, R 2 and 1."""
    shape = Shape(8, 1, 10, 3, (2, 1), 1.0)
    assert shape.body_parameters == 672
    original = 2 * 5 * (672 + 80) + 2 * 25 * 16
    shared = (3 + 3) * 672 + 3 * 80 + (4.5 + 2 * 3 + 2 + 1 * 3 + 0.5) * 16
    assert shape.theory() == pytest.approx(original / shared)


def test_ratios_are_within_rounds_and_of_cpu_time() -> None:
    def busy(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    found = harness.timed(
        {"slow": lambda: busy(0.03), "fast": lambda: busy(0.01), "idle": lambda: time.sleep(0.05)},
        3,
    )
    assert found["slow"].speed_up == harness.Ratio(1.0, 1.0, 1.0)
    assert 2 < found["fast"].speed_up.median < 4
    assert found["idle"].speed_up.lowest > 5
    assert len(found["fast"].seconds) == 3


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    for name in ("rrhf_step", "peak_memory"):
        command = [sys.executable, "-m", "benchmarks", name, "--shape", "S1"]
        command += ["--output", str(tmp_path)]
        if name == "rrhf_step":
            command += ["--rounds", "1"]
        subprocess.run(command, cwd=ROOT, check=True)
        assert (tmp_path / f"{name}_S1.json").exists()
