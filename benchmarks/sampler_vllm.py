"""Sampling with the local engine on a CPU, against vLLM's CPU build.

Both write responses of the same lengths to the same prompts, on one thread, in interleaved rounds.
What is counted is CPU time between the first prompt and the last response; loading, compiling and
copying weights into another layout before the first prompt are left out for vLLM, but the engine's
own copying, which each call does again, is counted. Before a time counts, the log-probs that each
of the two reports must be those of a plain forward in the same number format, up to its rounding.

vLLM runs in an environment of its own, whose Python `--vllm_python` names. `vllm` has its default
settings but does not compile the model; `vllm_blocks_of_32` shares prompts in smaller blocks (by
default they have 128 tokens, so more of a prompt is computed again for every response);
`vllm_compiled` compiles the model as well, which takes minutes, and is measured with
`--compiled yes`.
"""

from __future__ import annotations

import json
import math
import random
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.generation import END, IdCodec
from benchmarks.harness import ROOT, NotMeasured, cpu_seconds, lines, timed
from rrhf.data.chat_format import ChatCodec
from rrhf.data.sources import read_sets
from rrhf.generation.engine import Sample, SamplingParams, answers
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.local.row_loop import ByParams, Row
from rrhf.models.loading import LoadOptions, load_causal_lm, load_tokenizer
from rrhf.records import CandidateSet

SETTINGS = {
    "smollm2": "folder of SmolLM2-135M-Instruct: rrhf fetch smollm2 FOLDER",
    "hh": "a file of Anthropic's HH-RLHF, such as helpful-base/test.jsonl.gz",
    "vllm_python": "the Python of an environment with vLLM's CPU build",
    "compiled": "yes: measure vLLM with a compiled model too",
}


@dataclass(frozen=True)
class Job:
    """HH prompts of SmolLM2-135M, and how many responses of which lengths each gets.

    Attributes:
        dtype: number format of the weights.
        prompts, samples: numbers of prompts, and of responses to each.
        tokens: tokens of a response; if `is_ragged`, the median of lengths that scatter.
        max_rows: responses that the local engine writes at the same time.
    """

    dtype: str
    prompts: int
    samples: int
    tokens: int
    is_ragged: bool = False
    max_rows: int = 96

    def __str__(self) -> str:
        lengths = f"{self.tokens} tokens" if not self.is_ragged else "4..192 tokens"
        return (
            f"SmolLM2-135M {self.dtype}, {self.prompts} HH prompts, {self.samples} responses of "
            f"{lengths}"
        )

    def lengths(self) -> list[list[int]]:
        source = random.Random(0)

        def length() -> int:
            if not self.is_ragged:
                return self.tokens
            return max(4, min(192, round(source.lognormvariate(math.log(self.tokens), 0.8))))

        return [[length() for _ in range(self.samples)] for _ in range(self.prompts)]


CASES = {
    "even_float32": Job("float32", 12, 8, 64),
    "even_bfloat16": Job("bfloat16", 12, 8, 64),
    "ragged_float32": Job("float32", 64, 2, 48, is_ragged=True),
    "ragged_bfloat16": Job("bfloat16", 64, 2, 48, is_ragged=True),
}
GOALS = {
    "even_float32": 1.2,
    "even_bfloat16": 1.1,
    "ragged_float32": 1.2,
    "ragged_bfloat16": 1.1,
}
CLOSE = {"float32": 1e-3, "bfloat16": 0.1}
"""How far reported log-probs may be from those of a plain forward, in nats a token on average."""

_SETTINGS = {
    "vllm": {"enforce_eager": True},
    "vllm_blocks_of_32": {"enforce_eager": True, "block_size": 32},
    "vllm_compiled": {"enforce_eager": False, "block_size": 32},
}


class EndsAt:
    """A chooser that ends each response at its length, and nowhere else."""

    def __init__(
        self, lengths: Sequence[Sequence[int]], params: SamplingParams, ends: frozenset[int]
    ) -> None:
        self._lengths, self._inner = lengths, ByParams(params, frozenset())

    def __call__(
        self, logits: Tensor, rows: Sequence[Row], seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        tokens, logprobs = self._inner(logits, rows, seen)
        tokens[tokens == END] = END + 1
        lasts = [self._lengths[row.job][row.sample] <= len(row.token_ids) + 1 for row in rows]
        tokens[torch.tensor(lasts)] = END
        return tokens, logprobs


class Local:
    """The local engine with prompts that are ids already."""

    def __init__(self, job: Job, folder: str, prompts: Sequence[list[int]]) -> None:
        self._model = load_causal_lm(folder, LoadOptions(job.dtype)).eval()
        self._engine = LocalEngine(self._model, IdCodec(prompts), job.max_rows)  # type: ignore[arg-type]
        lengths = job.lengths()
        self._params = SamplingParams(
            num_return_sequences=job.samples, max_new_tokens=max(map(max, lengths)), seed=1
        )
        # Jobs are begun in the order of their lengths.
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        self._engine.chooser = partial(EndsAt, [lengths[place] for place in order])  # type: ignore[method-assign]
        self._sets = [CandidateSet(str(place), "") for place in range(len(prompts))]

    def __call__(self) -> list[list[Sample]]:
        return answers(self._engine, self._sets, self._params)

    @torch.no_grad()
    def plain_logprobs(self, prompt: list[int], response: Sequence[int]) -> Tensor:
        """Of a response's tokens, by a forward pass of prompt and response."""
        logits = self._model(torch.tensor([[*prompt, *response]])).logits[0].float()
        found = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return found.gather(-1, torch.tensor(response)[:, None])[:, 0]


class Vllm:
    """vLLM in a process of its own."""

    def __init__(self, python: str, settings: dict[str, Any], work: dict[str, Any]) -> None:
        self._line = json.dumps(work) + "\n"
        self._process = subprocess.Popen(
            [python, str(ROOT / "benchmarks" / "vllm_worker.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self._read()["version"]
        self.responses: list[tuple[list[int], list[float]]] = []

    def __call__(self) -> float:
        """Write all responses; return the CPU seconds."""
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.write(self._line)
        self._process.stdin.flush()
        found = self._read()
        self.responses = found["responses"]
        return float(found["seconds"])

    def _read(self) -> Any:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise NotMeasured(f"vLLM ended with {self._process.wait()}; its messages stand above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        self._process.stdin.close()
        self._process.wait(60)


@contextmanager
def vllms(
    python: str, job: Job, folder: str, prompts: Sequence[list[int]], is_compiled: bool
) -> Iterator[dict[str, Vllm]]:
    """Context manager: start vLLM with each of the settings."""
    work = {"prompts": prompts, "lengths": job.lengths()}
    with ExitStack() as running:
        found = {}
        for name, settings in _SETTINGS.items():
            if name != "vllm_compiled" or is_compiled:
                every = {"model": folder, "dtype": job.dtype, "max_model_len": 512, **settings}
                found[name] = Vllm(python, every, work)
                running.callback(found[name].close)
        yield found


def run(
    case: str,
    rounds: int,
    smollm2: str | None = None,
    hh: str | None = None,
    vllm_python: str | None = None,
    compiled: str | None = None,
) -> dict[str, Any]:
    """Check log-probs, then let all write in interleaved rounds.

    Raises:
        AssertionError: log-probs differ from those of a plain forward, or lengths are wrong.
        NotMeasured: vLLM's Python, the model or the prompts are not named.
    """
    if not vllm_python:
        raise NotMeasured("--vllm_python names the Python of an environment with vLLM")
    if not smollm2 or not hh:
        raise NotMeasured("--smollm2 and --hh name the model and the prompts")
    torch.set_num_threads(1)
    job = CASES[case]
    prompts = hh_prompts(smollm2, hh, job.prompts)
    local = Local(job, smollm2, prompts)
    with vllms(vllm_python, job, smollm2, prompts, compiled == "yes") as peers:
        theirs, *_ = peers.values()
        for peer in peers.values():
            peer()
        differences = {
            "vllm": {"logprobs": _distance(job, local, prompts, _grouped(job, theirs.responses))},
            "rrhf": {"logprobs": _distance(job, local, prompts, _of_samples(local()))},
        }
        variants: dict[str, Any] = {"vllm": theirs, "rrhf": partial(cpu_seconds, local)}
        variants |= {name: peer for name, peer in peers.items() if name != "vllm"}
        timings = timed(variants, rounds, are_warm=True, watch=lambda call: float(call()))  # type: ignore[arg-type]
        version = theirs.version
    return {
        "benchmark": "sampler_vllm",
        "case": case,
        "shape": job,
        "theory": None,
        "relative_differences": differences,
        "tokens": sum(map(sum, job.lengths())),
        "prompt_tokens": [min(map(len, prompts)), max(map(len, prompts))],
        "versions": {"vllm": version},
        "timings": timings,
    }


def hh_prompts(folder: str, hh: str, count: int) -> list[list[int]]:
    """Ids of the first prompts that have 82 to 287 tokens."""
    codec = ChatCodec(load_tokenizer(folder), "hh")
    found: list[list[int]] = []
    for prompt in read_sets(hh):
        ids = codec.encode_prompt(prompt, None)
        if ids and 82 <= len(ids) <= 287 and ids not in found:
            found.append(ids)
        if len(found) == count:
            return found
    raise NotMeasured(f"{hh} has {len(found)} prompts of 82 to 287 tokens; {count} are needed")


def _of_samples(found: list[list[Sample]]) -> list[list[tuple[list[int], list[float]]]]:
    return [
        [(s.token_ids.tolist(), s.logprobs.tolist()) for s in samples]  # type: ignore[union-attr]
        for samples in found
    ]


def _grouped(
    job: Job, responses: Sequence[tuple[list[int], list[float]]]
) -> list[list[tuple[list[int], list[float]]]]:
    every = iter(responses)
    return [[next(every) for _ in range(job.samples)] for _ in range(job.prompts)]


def _distance(
    job: Job,
    local: Local,
    prompts: Sequence[list[int]],
    found: Sequence[Sequence[tuple[list[int], list[float]]]],
) -> float:
    """Mean distance of the log-probs of a few responses from those of a plain forward.

    The last token of a response may have been put there by the benchmark, so it is left out.
    """
    for lengths, responses in zip(job.lengths(), found, strict=True):
        assert lengths == [len(ids) for ids, _ in responses], "other lengths than asked for"
    distances = []
    for place in range(0, job.prompts, max(1, job.prompts // 4)):
        ids, logprobs = found[place][0]
        plain = local.plain_logprobs(prompts[place], ids)
        distances.append((plain[:-1] - torch.tensor(logprobs)[:-1]).abs().mean())
    mean = float(torch.stack(distances).mean())
    assert mean <= CLOSE[job.dtype], f"log-probs are off by {mean:.2g} nats a token"
    return mean


def table(result: dict[str, Any]) -> str:
    """For the terminal."""
    rates = ", ".join(
        f"{name} {result['tokens'] / sorted(timing.seconds)[len(timing.seconds) // 2]:.0f}"
        for name, timing in result["timings"].items()
    )
    head = f"{result['case']}: {result['shape']}; tokens a CPU second: {rates}"
    return head + "\n" + lines(result["timings"], result["relative_differences"])
