"""Whole commands: training with the defaults against padded rows, and the demonstration.

What is counted is the CPU time of the processes, start-up, reading and saving included: what a user
waits for, if nothing else wants the machine. The baseline is this code with `--layout padded`; with
`--before FOLDER`, a checkout of an earlier version, it is that version's default, and the
demonstration is measured as well, which has no such flag.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import ROOT, NotMeasured, children_seconds, lines, timed
from benchmarks.shapes import Shape
from rrhf.worlds.help_desk.world import HelpDesk
from rrhf.worlds.tiny_model import build_tiny_llama, build_tokenizer, conversation_texts

SETTINGS = {"before": "a checkout of an earlier version, to compare whole commands with"}


@dataclass(frozen=True)
class Training:
    """`rrhf train rank` on prompts of one shape."""

    shape: Shape
    prompts: int

    def __str__(self) -> str:
        return f"rrhf train rank, {self.prompts} prompts, {self.shape}"

    @property
    def longest(self) -> int:
        return self.shape.prompt + max(self.shape.responses)

    def write(self, folder: Path) -> None:
        """policy/ and data.jsonl: random weights and words."""
        words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, self.shape.vocabulary))]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        )
        for part in (self.shape.model(), tokenizer):
            part.save_pretrained(folder / "policy")
        rng = random.Random(0)

        def text(length: int) -> str:
            return " ".join(rng.choices(words[3:], k=length))

        rows = [
            (text(self.shape.prompt), [text(length - 1) for length in self.shape.responses])
            for _ in range(self.prompts)
        ]
        _write_data(folder, rows)


@dataclass(frozen=True)
class DemoData:
    """`rrhf train rank` on the demonstration's prompts, model and lengths."""

    size: str
    responses: int = 4
    longest: int = 192

    def __str__(self) -> str:
        return f"rrhf train rank, the demonstration's data ({self.size}), N{self.responses}"

    def write(self, folder: Path) -> None:
        """policy/ and data.jsonl: replies of the world to other prompts of its own."""
        world = HelpDesk(self.size)
        demonstrations = world.demonstrations()
        texts = conversation_texts(demonstrations)
        shape = world.recipe().model
        tokenizer = build_tokenizer(texts, shape.vocab_size, folder / "policy")
        build_tiny_llama(shape, tokenizer).save_pretrained(folder / "policy")
        replies = sorted({c.response for s in demonstrations for c in s.candidates})
        rng = random.Random(0)
        prompts = world.prompts("train")
        _write_data(folder, [(s.query, rng.sample(replies, self.responses)) for s in prompts])


@dataclass(frozen=True)
class Demonstration:
    """`rrhf demo` from nothing to the table."""

    size: str

    def __str__(self) -> str:
        return f"rrhf demo --size {self.size}"


CASES: dict[str, Training | DemoData | Demonstration] = {
    "train": Training(Shape(256, 4, 8192, 256, (64,) * 4), 48),
    "train_demo_data": DemoData("full"),
    "demo": Demonstration("smoke"),
}
GOALS: dict[str, float] = {}
ROUNDS = {"train": 2, "train_demo_data": 2, "demo": 2}
BATCH = 4
PADDED = ("--layout", "padded")


def run(case: str, rounds: int, before: str | None = None) -> dict[str, Any]:
    """Let both run, interleaved.

    Raises:
        AssertionError: a training begins with another loss than the other.
        NotMeasured: the demonstration without an earlier version.
    """
    sizes = CASES[case]
    if isinstance(sizes, Demonstration) and not before:
        raise NotMeasured("there is nothing to compare it with; --before names an earlier checkout")
    versions = {"before": _commit(Path(before))} if before else {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if isinstance(sizes, Demonstration):
            task = ["demo", "--size", sizes.size, "--jobs", "1"]
        else:
            sizes.write(folder)
            task = ["train", "rank", "--model_name_or_path", str(folder / "policy")]
            task += ["--data_path", str(folder / "data.jsonl"), "--num_train_epochs", "1"]
            task += ["--per_device_train_batch_size", str(BATCH), "--logging_steps", "1"]
            task += ["--model_max_length", str(sizes.longest)]
        ways = {
            "before" if before else "padded": _Command(
                folder, Path(before) if before else ROOT, task if before else [*task, *PADDED]
            ),
            "now": _Command(folder, ROOT, task),
        }
        for way in ways.values():
            way.warm_up()
        timings = timed(ways, rounds, are_warm=True, watch=children_seconds)
        differences = {}
        if not isinstance(sizes, Demonstration):
            first, second = (command.first_loss for command in ways.values())
            differences["now"] = {"first loss": abs(second - first) / abs(first)}
            assert differences["now"]["first loss"] < 1e-4, f"{case}: {first} and {second}"
    return {
        "benchmark": "demo_speed",
        "case": case,
        "shape": sizes,
        "theory": None,
        "relative_differences": differences,
        "versions": versions,
        "timings": timings,
    }


class _Command:
    """A command of one version of the code, each time with a folder of its own."""

    def __init__(self, folder: Path, code: Path, task: list[str]) -> None:
        self.folder, self.code, self.task = folder, code, task
        self.first_loss = float("nan")

    def warm_up(self) -> None:
        """Compile the sources, and have them and the packages at hand."""
        self._python(["-c", "import rrhf.training.methods.rank"], self.folder)

    def __call__(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            output = Path(scratch) / "out"
            command = ["-m", "rrhf.cli.main", *self.task, "--output_dir", str(output)]
            self._python(command, Path(scratch))
            metrics = output / "metrics.jsonl"
            if metrics.exists():
                self.first_loss = json.loads(metrics.read_text().splitlines()[0])["loss"]

    def _python(self, arguments: list[str], folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(self.code.resolve()), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}"


def table(result: dict[str, Any]) -> str:
    """For people."""
    head = f"{result['case']}: {result['shape']}; CPU time of the whole command"
    return head + "\n" + lines(result["timings"], result["relative_differences"])


def _write_data(folder: Path, rows: list[tuple[str, list[str]]]) -> None:
    rng = random.Random(1)
    with (folder / "data.jsonl").open("w") as file:
        for query, responses in rows:
            scores = [rng.random() for _ in responses]
            row = {"query": query, "responses": responses, "scores": scores}
            file.write(json.dumps(row) + "\n")


def _commit(checkout: Path) -> str:
    asked = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(asked, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"
