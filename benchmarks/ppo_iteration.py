"""One iteration of PPO against TRL's: rollout, scores, reference, values, and the epochs of steps.

Both sides are their own trainers, each in a process that is stopped between two iterations; the
rounds interleave, and what counts is each one's CPU time from stop to stop. Same random models,
same prompts, same batches and number of optimiser steps; no response may end early. Both sample by
themselves, so what is compared before anything is timed is what must be so whatever was sampled.

A trunk that policy and critic share, and LoRA, are other algorithms than TRL's, which has a critic
of its own: they say what our users can choose, and stand apart.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from benchmarks.harness import ROOT, NotMeasured, Ratio, Timing, lines
from benchmarks.workers import Worker

PEER, OURS = "TRL 1.10", "rrhf"
PEER_VERSION = "1.10.0"
PEER_PYTHON = ROOT / "trl-env" / "bin" / "python"
SETTINGS = {
    "trl_python": f"interpreter of an environment with TRL {PEER_VERSION}, by default that of "
    f"trl-env/: python -m venv trl-env; trl-env/bin/pip install trl=={PEER_VERSION} "
    f"torch=={torch.__version__.partition('+')[0]} transformers=={transformers.__version__}"
}


@dataclass(frozen=True)
class Case:
    """Sizes of an iteration and what our side is.

    Attributes:
        critic: "separate", "shared trunk", or "LoRA" (rank 16 on a shared trunk).
        samples: responses to each prompt; the peer reads every one with a prompt of its own.
        hidden, layers, vocabulary: of all models; the MLP is 2.5 times as wide as H.
        prompt, response: tokens.
        rows: responses of a rollout, all of them in one step.
        epochs: passes over them, a step each.
        heads, key_heads: of their attention.
        mlp: its width, where it is another.
        micro_rows: that pass the model at a time; 0 = all of them.
        device: "cpu", in float32, or "cuda", in bfloat16.
        layout: how rows pass our models.
    """

    critic: str
    samples: int = 1
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 32768
    prompt: int = 192
    response: int = 64
    rows: int = 8
    epochs: int = 4
    learning_rate: float = 1e-6
    heads: int = 8
    key_heads: int = 4
    mlp: int = 0
    micro_rows: int = 0
    device: str = "cpu"
    layout: str = "auto"

    @property
    def intermediate(self) -> int:
        return self.mlp or 5 * self.hidden // 2

    def __str__(self) -> str:
        shared = f" ({self.samples} to a prompt)" if self.samples > 1 else ""
        return (
            f"H{self.hidden} L{self.layers} V{self.vocabulary // 1024}k P{self.prompt} "
            f"R{self.response}, {self.rows} responses{shared}, {self.epochs} epochs"
        )

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )

    def theory(self) -> float:
        """The ratio of multiplications, theirs over ours."""
        theirs, ours = self.multiplications()
        return theirs / ours

    def multiplications(self) -> tuple[float, float]:
        """Theirs and ours, for one response of an iteration.

        Theirs: whole rows, dense attention, the head at every position of reference and steps.
        Ours: every prompt once, causal attention, the head at response positions; a frozen head
        and frozen weights cost no gradient of their own. A backward pass is two forwards.
        """
        p, r, h = self.prompt, self.response, self.hidden
        grouped = h * self.key_heads // self.heads
        body = self.layers * (2 * h * (h + grouped) + 3 * h * self.intermediate)
        head, pair = h * self.vocabulary, 2 * h * self.layers
        whole = (p + r) * body + (p + r) ** 2 * pair
        written = (r - 1) * (body + head) + head + r * (p + r / 2) * pair
        theirs = p * body + p**2 * pair + written + 3 * whole + (p + r) * head
        theirs += 3 * self.epochs * (2 * whole + (p + r) * head)
        once = p / self.samples
        causal = once * p / 2 + r * p + r**2 / 2
        mine = (once + r) * body + causal * pair
        ours = once * body + once * p / 2 * pair + written + 3 * mine + r * head
        ours += (
            self.epochs
            * {
                "separate": 6 * mine + 3 * r * head,
                "shared trunk": 3 * mine + 3 * r * head,
                "LoRA": 2 * mine + 2 * r * head,
            }[self.critic]
        )
        return theirs, ours


CASES = {
    "separate_critic": Case("separate"),
    "shared_trunk": Case("shared trunk"),
    "lora": Case("LoRA"),
    "four_samples": Case("separate", samples=4),
}
GOALS = {"separate_critic": 1.5, "shared_trunk": 2.2, "lora": 2.4}

ROUNDS = {"separate_critic": 3, "shared_trunk": 2, "lora": 2, "four_samples": 2}


def run(case: str, rounds: int, trl_python: str | None = None) -> dict[str, Any]:
    """Compare, then time.

    Args:
        case: name.
        rounds: that count; one more goes before them.
        trl_python: as in `SETTINGS`.

    Raises:
        NotMeasured: there is no such peer.
        AssertionError: one side does not do what the other does.
    """
    sizes = CASES[case]
    peer = trl_python or str(PEER_PYTHON)
    _require_peer(peer)
    commands = {
        PEER: [peer, "-m", "benchmarks.ppo_trl"],
        OURS: [sys.executable, "-m", "benchmarks.ppo_rrhf"],
    }
    told: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        workers = {}
        world = write_world(Path(folder), sizes)
        for name, command in commands.items():
            told[name] = []
            workers[name] = stack.enter_context(
                Worker([*command, str(world), json.dumps(asdict(sizes))])
            )
        for number in range(rounds + 1):
            for name in workers if number % 2 else reversed(workers):
                told[name].append(workers[name].piece())
            if number == 0:
                differences = compare({name: found[0] for name, found in told.items()}, sizes)
    baseline = [one["seconds"] for one in told[PEER][1:]]
    timings = {}
    for name, found in told.items():
        mine = [one["seconds"] for one in found[1:]]
        ratio = Ratio.of([base / own for base, own in zip(baseline, mine, strict=True)])
        timings[name] = Timing([round(value, 4) for value in mine], ratio)
    return {
        "benchmark": "ppo_iteration",
        "case": case,
        "shape": sizes,
        "theory": sizes.theory(),
        "relative_differences": differences,
        "timings": timings,
        "versions": {"trl": PEER_VERSION},
    }


def compare(first: dict[str, dict[str, Any]], sizes: Case) -> dict[str, dict[str, float]]:
    """What must be so of a first iteration, whatever was sampled.

    The policy is the reference, so the KL is zero; the step begins at the policy that sampled, so
    ratios are one; both have the same entropy and do the same number of steps. At these learning
    rates four steps move none of it by more than a thousandth.
    """
    ours = first[OURS]
    assert abs(ours["first_ratio"] - 1) < 1e-4, f"the first step's ratio: {ours}"
    assert ours["shortest_response"] == sizes.response, f"responses ended early: {ours}"
    for name, found in first.items():
        assert found["optimizer_steps"] == sizes.epochs, f"{name}: {found}"
        assert abs(found["kl"]) < 1e-3 and abs(found["ratio"] - 1) < 1e-3, f"{name}: {found}"
        assert abs(found["entropy"] / math.log(sizes.vocabulary) - 1) < 0.05, f"{name}: {found}"
    entropy = abs(ours["entropy"] / first[PEER]["entropy"] - 1)
    assert entropy < 1e-3, f"entropies: {first}"
    return {OURS: {"entropy": entropy, "kl": abs(ours["kl"] - first[PEER]["kl"])}}


def table(result: dict[str, Any]) -> str:
    """For the terminal."""
    head = f"{result['case']}: {result['shape']}; FLOP ratio {result['theory']:.2f}"
    return f"{head}\n{lines(result['timings'], result['relative_differences'])}"


def write_world(folder: Path, sizes: Case) -> Path:
    """policy/, reward/ and prompts.jsonl, of random weights and words; returns the folder."""
    words = ["<s>", "</s>", "<pad>", *(f"w{i}" for i in range(3, sizes.vocabulary))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    torch.manual_seed(0)
    score_config = sizes.config()
    score_config.num_labels = 1
    # Large ones are made where they compute, and take half of the disk.
    dtype = torch.bfloat16 if sizes.device == "cuda" else torch.float32
    with torch.device(sizes.device):
        policy = LlamaForCausalLM._from_config(sizes.config(), dtype=dtype)
        policy.save_pretrained(folder / "policy")
        del policy
        scorer = LlamaForSequenceClassification._from_config(score_config, dtype=dtype)
        scorer.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(1)
    with (folder / "prompts.jsonl").open("w") as file:
        for _ in range(8 * sizes.rows // sizes.samples):
            ids = torch.randint(3, len(words), (sizes.prompt,), generator=generator).tolist()
            row = {"query": " ".join(words[i] for i in ids), "responses": [], "ids": ids}
            file.write(json.dumps(row) + "\n")
    return folder


def _require_peer(python: str) -> None:
    code = "from importlib.metadata import version; print(version('trl'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT)
        found = done.stdout.strip()
    except OSError as error:
        found = f"no interpreter ({error.strerror})"
    if found != PEER_VERSION:
        what = f"{python}: TRL {PEER_VERSION} is wanted, there is {found or 'none'}"
        raise NotMeasured(f"{what}; --trl_python: {SETTINGS['trl_python']}")
