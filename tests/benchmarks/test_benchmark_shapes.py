"""Benchmarks that grow a size, that want a GPU, or that run whole commands, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import demo_speed, gpu_step, harness, peak_memory, scaling
from benchmarks.everything import one_case
from benchmarks.shapes import Shape
from rrhf.models.forward.logprobs import LogprobOptions, Policy

TINY = Shape(32, 2, 64, 9, (5, 3, 6))


def test_an_axis_grows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axis = scaling.Axis("N", (1, 3), TINY)
    assert [axis.shape(n).responses for n in axis.values] == [(5,), (5, 5, 5)]
    assert scaling.Axis("P", (4,), TINY).shape(4).prompt == 4
    assert scaling.Axis("R", (4,), TINY).shape(4).responses == (4, 4, 4)
    monkeypatch.setitem(scaling.CASES, "tiny", axis)
    assert one_case("scaling", scaling, "tiny", 1, tmp_path, {}) == 0
    result = json.loads((tmp_path / "scaling_tiny.json").read_text())
    assert [point["value"] for point in result["points"]] == [1, 3]
    assert (tmp_path / "scaling_tiny.png").read_bytes()[1:4] == b"PNG"


def test_a_gpu_step_on_the_cpu() -> None:
    result = gpu_step.measured("tiny", gpu_step.GpuCase(TINY, True, "float32"), 1, "cpu", 1e-3)
    ways = result["ways"]
    assert {"seconds", "mfu"} <= set(ways["original"]) & set(ways["shared_sdpa"])
    assert ways["original"]["times_as_fast"] == 1.0
    assert "flash" in ways["shared_flash"]["failed"]
    assert "shared_sdpa" in gpu_step.table(result)


def test_memory_that_runs_out_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: Any) -> torch.nn.Module:
        raise torch.OutOfMemoryError

    padded = gpu_step.WAYS["padded_sdpa"]
    monkeypatch.setattr(gpu_step, "WAYS", {"original": ("sdpa", full), "padded_sdpa": padded})
    case = gpu_step.GpuCase(TINY, dtype="float32")
    ways = gpu_step.measured("tiny", case, 1, "cpu", None)["ways"]
    assert ways["original"] == {"failed": "out of memory"}
    assert ways["padded_sdpa"]["times_as_fast"] == 1.0


def test_a_way_that_computes_something_else_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = ("sdpa", lambda model: Policy(model, LogprobOptions(3.0)))
    ways = {"original": gpu_step.WAYS["original"], "padded_sdpa": wrong}
    monkeypatch.setattr(gpu_step, "WAYS", ways)
    case = gpu_step.GpuCase(TINY, dtype="float32")
    ways = gpu_step.measured("tiny", case, 1, "cpu", None)["ways"]
    assert ways["padded_sdpa"]["failed"].startswith("differs: loss by")


def test_without_a_gpu_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert one_case("gpu_step", gpu_step, "1B", 1, tmp_path, {}) == 2
    result = harness.read_all(tmp_path)["gpu_step", "1B"]
    assert result["not_measured"] == "no CUDA device"


def test_the_shapes_of_a_gpu_have_their_names_sizes() -> None:
    """1.24 and 6.74 thousand million weights, input embeddings included."""
    for case, expected in (("1B", 1.24e9), ("7B", 6.74e9)):
        shape = gpu_step.CASES[case].shape
        embedded = shape.hidden * shape.vocabulary * (1 if case == "1B" else 2)
        assert shape.body_parameters + embedded == pytest.approx(expected, rel=0.01)


def test_a_card_is_known_by_its_name() -> None:
    assert gpu_step.peak_of("NVIDIA H100 PCIe") == 756.0
    assert gpu_step.peak_of("NVIDIA H100 80GB HBM3") == 989.0
    assert gpu_step.peak_of("NVIDIA A10G") == 70.0
    assert gpu_step.peak_of("Some other card") is None


def test_whole_commands_alternate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[list[str], str]] = []

    def python(self: Any, arguments: list[str], folder: Path) -> None:
        ran.append((arguments, str(self.code)))
        if "--output_dir" in arguments:
            output = Path(arguments[-1])
            output.mkdir()
            (output / "metrics.jsonl").write_text('{"loss": 2.0}\n{"loss": 1.0}\n')

    monkeypatch.setattr(demo_speed._Command, "_python", python)
    monkeypatch.setattr(
        demo_speed, "timed", lambda ways, *_, **__: [way() for way in ways.values()]
    )
    monkeypatch.setitem(demo_speed.CASES, "tiny", demo_speed.Training(TINY, 3))
    result = demo_speed.run("tiny", 1)
    padded, now = (arguments for arguments, _ in ran if "rank" in arguments)
    assert "padded" in padded and "--layout" not in now
    assert result["relative_differences"]["now"]["first loss"] == 0.0
    with pytest.raises(harness.NotMeasured, match="--before"):
        demo_speed.run("demo", 1)
    ran.clear()
    demo_speed.run("demo", 1, before=str(tmp_path))
    assert [code for arguments, code in ran if "demo" in arguments] == [
        str(tmp_path),
        str(harness.ROOT),
    ]


@pytest.mark.slow
def test_a_command_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(demo_speed.CASES, "tiny", demo_speed.Training(TINY, 6))
    result = demo_speed.run("tiny", 1)
    assert result["timings"]["now"].speed_up.median > 0.5


def test_memory_of_a_small_step_in_a_process_of_its_own() -> None:
    small = Shape(64, 2, 4096, 64, (16,) * 4)
    assert peak_memory._in_a_fresh_process(small, "original") > 5
