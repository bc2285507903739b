"""The programme for a GPU, on the CPU: a slice of it for real, and what it makes of accidents."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.__main__ import main
from benchmarks.gpu import layouts, programme, training
from benchmarks.gpu.book import Book, report
from benchmarks.gpu.parts import PARTS
from benchmarks.harness import ROOT
from rrhf.models.forward.layouts import FastPolicy

TINY = ["gpu", "--tiny", "--device", "cpu"]

FAKE = """
import json, os, sys, time
part, setting, skipped = sys.argv[1], sys.argv[2], sys.argv[3:]
def tell(**record):
    print(json.dumps(record), flush=True)
open(os.environ["CALLS"], "a").write(" ".join(["begin", part, *skipped]) + "\\n")
items = {"layouts": ["a", "dies", "b"], "step": ["c", "hangs", "d"], "ppo": ["wrong"]}[part]
tell(items=items)
for item in items:
    if item in skipped:
        continue
    tell(begin=item)
    if item == "dies":
        os.kill(os.getpid(), 11)
    if item == "hangs":
        time.sleep(float(os.environ["HANGS"]))
    status = {"wrong": "failed", "b": "left out"}.get(item, "done")
    tell(item=item, status=status, line="it was " + item, seconds=0.1, number=7)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Parts whose processes die, hang or fail; gives how they were called."""
    script, calls = tmp_path / "fake.py", tmp_path / "calls"
    script.write_text(FAKE)
    calls.touch()
    monkeypatch.setattr(programme, "CHILD", (str(script),))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("HANGS", "600")
    return lambda: calls.read_text().splitlines()


def book_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "gpu.json").read_text())["parts"]
    return found


def statuses(output: Path, part: str) -> dict[str, str]:
    return {item: entry["status"] for item, entry in book_of(output)[part]["items"].items()}


def test_a_slice_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    asked = [*TINY, "--output", str(output), "--parts", "layouts"]
    assert main(asked) == 0
    found = book_of(output)["layouts"]["items"]
    assert list(found) == layouts.items(None)  # type: ignore[arg-type]
    for item, entry in found.items():
        if item.split()[0] in ("rows", "shared_prefix", "dense_mask"):
            assert entry["status"] == "done" and set(entry["distances"]) == set(entry["allowed"])
        else:
            assert (entry["status"], entry["line"]) == ("left out", "needs a CUDA device")
    assert "| rows float32 llama | done | log-probs off by" in (output / "gpu.md").read_text()
    written = (output / "gpu.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(asked) == 0  # nothing is begun again
    assert "24 results kept" in capsys.readouterr().out
    assert (output / "gpu.json").stat().st_mtime_ns == written


def test_a_process_that_dies_costs_one_item(
    fake: Callable[[], list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    asked = [*TINY, "--output", str(output), "--parts", "layouts"]
    assert main(asked) == 1
    assert statuses(output, "layouts") == {"a": "done", "dies": "failed", "b": "left out"}
    assert book_of(output)["layouts"]["items"]["a"]["number"] == 7
    assert fake() == ["begin layouts", "begin layouts a dies"]
    assert "failed: layouts dies: its process ended with -11" in capsys.readouterr().err
    assert main(asked) == 1  # the failure is tried again, and nothing else
    assert fake()[2:] == ["begin layouts a b", "begin layouts a b dies"]


def test_time_that_is_used_up(
    fake: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PARTS, "step", ("hangs", 4))  # a busy machine still does "c" in it
    monkeypatch.setattr(programme, "PATIENCE_OF_A_CPU", 1)
    monkeypatch.setattr(programme, "LEAST_SECONDS", 0.1)
    output = tmp_path / "out"
    asked = [*TINY, "--output", str(output), "--parts", "step"]
    started = time.monotonic()
    assert main(asked) == programme.GO_ON
    assert time.monotonic() - started < 300, "it waited for what hangs"
    assert statuses(output, "step") == {"c": "done", "hangs": "cut short"}
    assert book_of(output)["step"]["note"] == "cut short: its 4 seconds were used up"
    monkeypatch.setenv("HANGS", "0")
    monkeypatch.setitem(PARTS, "step", ("hangs", 60))
    assert main(asked) == 0
    assert statuses(output, "step") == {"c": "done", "hangs": "done", "d": "done"}
    assert fake() == ["begin step", "begin step c"]


def test_no_time_for_a_part(fake: Callable[[], list[str]], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert main([*TINY, "--output", str(output), "--minutes", "0.01"]) == programme.GO_ON
    assert not fake()
    assert book_of(output)["step"]["note"].startswith("not begun")


def test_a_signal_ends_its_processes_and_keeps_results(
    fake: Callable[[], list[str]], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    script = f"""
import sys
from benchmarks.gpu import programme
programme.CHILD = {programme.CHILD!r}
sys.exit(programme.main({[*TINY[1:], "--output", str(output), "--parts", "step"]!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True)
    try:
        ends = time.monotonic() + 500
        while time.monotonic() < ends:
            if (output / "gpu.json").exists() and "c" in statuses(output, "step"):
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == programme.GO_ON
        assert statuses(output, "step")["c"] == "done"
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
        left = subprocess.run(["pgrep", "-f", programme.CHILD[0]], capture_output=True, text=True)
        assert not left.stdout
    finally:
        process.kill()


def test_earlier_results_of_other_sources_do_not_count(
    fake: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    asked = [*TINY, "--output", str(output), "--parts", "ppo"]
    assert main(asked) == 1
    book = Book(output, {"device": "cpu", "tiny": True})
    book.put("ppo", "wrong", "done", "mended")
    assert Book(output, {"device": "cpu", "tiny": True}).is_settled("ppo", "wrong")
    assert not Book(output, {"device": "cuda", "tiny": True}).is_settled("ppo", "wrong")
    other = {"commit": "abc", "sources": "other"}
    monkeypatch.setattr("benchmarks.harness.code", lambda: other)
    assert not Book(output, {"device": "cpu", "tiny": True}).is_settled("ppo", "wrong")
    assert not Book(output, {"device": "cpu", "tiny": True}, fresh=True).parts


def test_without_a_gpu_it_asks_for_tiny(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(programme, "_has_gpu", lambda: False)
    assert main(["gpu", "--output", str(tmp_path / "out")]) == programme.NO_GPU
    assert "add --tiny" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_all_parts_fit_into_their_time() -> None:
    assert sum(seconds for _, seconds in PARTS.values()) <= 25 * 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layout_that_is_wrong_by_a_token_is_noticed(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of 8 where the model has 7."""

    class Wider(FastPolicy):
        def __init__(self, model: Any, layout: str) -> None:
            model.config.sliding_window += 1
            super().__init__(model, layout)

    assert layouts.compare("shared_prefix", dtype, "window", "cpu", True)["passed"]
    monkeypatch.setattr(layouts, "FastPolicy", Wider)
    found = layouts.compare("shared_prefix", dtype, "window", "cpu", True)
    assert not found["passed"], found["line"]


def test_runs_that_are_not_the_same_are_told_apart(tmp_path: Path) -> None:
    for name in ("left", "right"):
        (tmp_path / name / "policy").mkdir(parents=True)
        row = {"step": 1, "loss": 0.5, "tokens_per_second": 3.0 if name == "left" else 4.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        save_file({"w": torch.ones(2)}, tmp_path / name / "policy" / "model.safetensors")
    left, right = tmp_path / "left", tmp_path / "right"
    assert training.differences(left, right) == []
    save_file({"w": torch.tensor([1.0, 1.0 + 2**-23])}, right / "policy" / "model.safetensors")
    (right / "metrics.jsonl").write_text('{"step": 1, "loss": 0.25}\n')
    assert training.differences(left, right) == ["policy/model.safetensors", "metrics.jsonl"]


def test_the_readme_takes_its_figures_from_the_programme(tmp_path: Path) -> None:
    """As a card's would be, from a results file made by hand."""
    numbers = {"seconds": [0.5, 0.4, 0.6], "tokens_per_second": 9999, "mfu": 0.25, "peak_gib": 12.5}
    faster = {**numbers, "seconds": [0.25], "mfu": 0.4}
    book = Book(tmp_path / "gpu", {"device": "cuda", "tiny": False})
    machine = {"gpu": "a card", "python": "3", "torch": "2", "transformers": "5"}
    book.put("preflight", "environment", "done", "a card", machine=machine)
    for way, found in (("original", numbers), ("shared_sdpa", faster)):
        step = {"case": "1B", "way": way, "sizes": "H2048", "numbers": found}
        book.put("step", f"1B {way}", "done", "fast", **step)
    book.put("training", "rank", "done", "bit-equal")
    readme = tmp_path / "README.md"
    marks = [
        f"<!-- benchmarks {name} -->\n<!-- end of benchmarks {name} -->\n"
        for name in ("gpu", "programme", "machine")
    ]
    readme.write_text("".join(marks))
    readme.write_text(readme.read_text().replace(" -->\n<!--", " -->\nold\n<!--"))
    assert main(["table", "--results", str(tmp_path), "--readme", str(readme)]) == 0
    written = readme.read_text()
    assert "| `gpu_step` 1B | H2048 | shared_sdpa | 250 | 9,999 | 40.0% | 12.5 | 2.00 |" in written
    assert "| `training` | rank | done | bit-equal |" in written
    assert "- a card; python 3" in written
    assert "| rank | done | bit-equal |" in report(book.parts)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_of_it(tmp_path: Path) -> None:
    """Every part, down to its last path that a CPU has."""
    command = [sys.executable, "-m", "benchmarks", *TINY, "--output", str(tmp_path)]
    command += ["--minutes", "55"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(book_of(tmp_path)) == list(PARTS)
