"""The benchmarks measure what they say: an honest baseline, and variants that compute the same."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import everything, harness, registry, rrhf_step, shapes
from benchmarks.__main__ import main
from benchmarks.everything import in_fresh_processes, one_case, path_of
from benchmarks.original_step import OriginalStyle
from benchmarks.shapes import Shape
from benchmarks.tables import TABLES
from rrhf.data.collate import EncodedSet, collate
from rrhf.models.forward.logprobs import LogprobOptions, Policy

TINY = Shape(32, 2, 64, 9, (5, 3, 6))


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
    result = rrhf_step.run("tiny", 1, list(rrhf_step.VARIANTS))
    assert "shared_prefix_checkpointed" in rrhf_step.table(result)
    warm = rrhf_step.Variant(lambda shape: Policy(shape.model(), LogprobOptions(1.001)))
    monkeypatch.setitem(rrhf_step.VARIANTS, "wrong", warm)
    monkeypatch.setattr(rrhf_step, "timed", None)
    with pytest.raises(AssertionError, match="wrong differs"):
        rrhf_step.run("tiny", 1, ["wrong"])


def test_the_flop_ratio_by_hand() -> None:
    """One layer, H 8, so G 4, MLP 20: 2*8*12 + 3*8*20 = 672 weights; head 8*10; P 3, R 2 and 1."""
    shape = Shape(8, 1, 10, 3, (2, 1))
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


def test_an_option_per_benchmark_and_a_file_per_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["rrhf_step", "--case", "tiny", "--rounds", "2", "--variants", "dense_mask", "padded"]
    assert main([*asked, "--output", str(tmp_path)]) == 0
    assert "dense_mask" in capsys.readouterr().out
    result = harness.read_all(tmp_path)["rrhf_step", "tiny"]
    assert list(result["timings"]) == ["original", "dense_mask", "padded"]
    assert result["goal"] is None
    assert harness.is_current(tmp_path / "rrhf_step_tiny.json")


def test_what_cannot_be_measured_says_so(tmp_path: Path) -> None:
    def run(case: str, rounds: int) -> dict[str, object]:
        raise harness.NotMeasured("no such card")

    module = SimpleNamespace(CASES={"big": TINY}, GOALS={"big": 2.0}, run=run)
    assert one_case("rrhf_step", module, "big", 1, tmp_path, {}) == 2  # type: ignore[arg-type]
    assert harness.read_all(tmp_path)["rrhf_step", "big"]["not_measured"] == "no such card"


def test_the_readme_tables_come_from_the_results(tmp_path: Path) -> None:
    timing = {"seconds": [0.3, 0.2], "speed_up": {"median": 2.5, "lowest": 2.0, "highest": 3.0}}
    base = {"seconds": [0.6, 0.6], "speed_up": {"median": 1.0, "lowest": 1.0, "highest": 1.0}}
    step = {"benchmark": "rrhf_step", "case": "S1", "shape": TINY, "theory": 3.256, "goal": 3.0}
    step |= {"load_before": 1.5, "versions": {"trl": "1.2"}}
    step["timings"] = {"original": base, "shared_prefix": timing, "padded": base}
    peak = {"benchmark": "peak_memory", "case": "S3", "shape": TINY, "sizes": "H32", "goal": 5.0}
    peak |= {"extra_mib": {"original": 60.0, "ours": 10.0}, "times_less": {"ours": 6.0}}
    for result in (step, peak):
        harness.write(tmp_path / f"{result['benchmark']}.json", result)
    readme = tmp_path / "README.md"
    marks = [
        f"<!-- benchmarks {name} -->\nold\n<!-- end of benchmarks {name} -->\n" for name in TABLES
    ]
    readme.write_text("Before.\n" + "".join(marks) + "After.\n")
    assert main(["table", "--results", str(tmp_path), "--readme", str(readme)]) == 0
    written = readme.read_text()
    assert "old" not in written and written.endswith("After.\n")
    assert "shared_prefix 250 | **2.50** [2.00-3.00] | 2 | 3: missed | 3.26 | 1.5, " in written
    assert "| `rrhf_step` S1 | padded | 600 | 1.00 [1.00-1.00] |" in written
    assert "original 60 | ours 10 | **6.00** | 5: met" in written
    assert "| `rrhf_step` S3 | H512 L6 V32k P512 R96 N6 | not measured |" in written
    assert f"torch {torch.__version__}" in written and "- trl 1.2: `rrhf_step`" in written
    main(["table", "--results", str(tmp_path), "--readme", str(readme)])
    assert readme.read_text() == written


def test_each_benchmark_keeps_the_contract() -> None:
    for name in registry.NAMES:
        module = registry.load(name)
        assert module.CASES and set(module.GOALS) <= set(module.CASES), name
        assert set(getattr(module, "ROUNDS", {})) <= set(module.CASES), name


def test_all_goes_on_after_a_failure_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        name, case = command[3], command[5]
        started.append(f"{name} {case}")
        if name == "rrhf_step":
            return SimpleNamespace(returncode=1)
        missing = {} if case == "S1" else {"not_measured": "no TRL"}
        harness.write(path_of(tmp_path, name, case), {"benchmark": name, "case": case, **missing})
        return SimpleNamespace(returncode=2 if missing else 0)

    monkeypatch.setattr(everything.subprocess, "run", run)
    modules = {name: registry.load(name) for name in ("rrhf_step", "trl_head")}
    for module in modules.values():
        monkeypatch.setattr(module, "CASES", {"S1": TINY, "S1_32k": TINY})
    for resume in (False, True):
        assert in_fresh_processes(modules, 1, tmp_path, {"trl_path": "x"}, resume) == 1
    found = harness.read_all(tmp_path)
    assert found["rrhf_step", "S1"]["not_measured"] == "failed with exit code 1"
    both = ["rrhf_step S1", "rrhf_step S1_32k"]
    assert started == [*both, "trl_head S1", "trl_head S1_32k", *both, "trl_head S1_32k"]
    assert "failed: rrhf_step S1: exit code 1" in capsys.readouterr().err


@pytest.mark.slow
def test_every_case_has_a_process_of_its_own(tmp_path: Path) -> None:
    cases = SimpleNamespace(CASES={"S1": TINY})
    modules: dict[str, Any] = {"rrhf_step": cases}
    for _ in range(2):
        assert in_fresh_processes(modules, 1, tmp_path, {}, resume=True) == 0
    assert (tmp_path / "rrhf_step_S1.json").exists()
