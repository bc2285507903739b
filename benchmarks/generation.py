"""Sampling N responses to a prompt, against `model.generate` and its continuous batching.

Lengths are the same for all: a response ends where the case says, whatever the model thinks. Before
anything is timed, greedy responses must be those of `generate`, and the log-probs of what was
sampled those of a plain forward.

Variants beside the baseline `generate` (which is given the prompts of a batch together, N rows
each) and `shared_prompt` (the engine as users have it): `shared_prompt_mkl`, without oneDNN's
products; `generate_onednn`, the baseline with them; `fixed_batches`, the engine with prompts that
begin together; `plain`, its rows with prompts repeated; `generate_batch`, transformers' continuous
batching, which shares prompts by blocks.

The FLOP ratio counts operations alone: where oneDNN takes half of MKL's time for each, the engine
goes beyond it. What sharing gives with equal products is `shared_prompt_mkl` against `generate`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LogitsProcessorList

from benchmarks.harness import lines, timed
from benchmarks.shapes import Shape
from rrhf.generation.engine import Sample, SamplingParams, answers
from rrhf.generation.local.decoders import Decoder
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.local.incremental import IncrementalModel
from rrhf.generation.local.row_loop import ByParams, Job, Row, RowLoop
from rrhf.generation.local.shared_prompt import SharedPromptModel, in_place
from rrhf.models.forward import onednn_linear
from rrhf.models.forward.onednn_linear import fast_linears
from rrhf.records import CandidateSet

PAD, END = 0, 2


@dataclass(frozen=True)
class Rollout:
    """Prompts with responses of given lengths.

    Attributes:
        shape: model; its `prompt` is the longest prompt, its `responses` those of one prompt.
        prompts: tokens of each prompt, the longest first.
        lengths: tokens of each response of each prompt.
        max_rows: responses that are written at the same time.
    """

    shape: Shape
    prompts: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    max_rows: int

    def __str__(self) -> str:
        if len(self.prompts) == 1:
            return str(self.shape)
        every = [length for lengths in self.lengths for length in lengths]
        sizes = self.shape
        return (
            f"H{sizes.hidden} L{sizes.layers} V{sizes.vocabulary // 1024}k "
            f"{len(self.prompts)} prompts of {self.prompts[-1]}..{self.prompts[0]}, "
            f"N{self.count} R{min(every)}..{max(every)}, {self.max_rows} rows"
        )

    @property
    def count(self) -> int:
        """Responses of a prompt."""
        return len(self.lengths[0])

    @property
    def longest(self) -> int:
        return max(length for lengths in self.lengths for length in lengths)

    @property
    def batches(self) -> list[slice]:
        """The prompts that a fixed batch holds."""
        size = max(1, self.max_rows // self.count)
        return [slice(start, start + size) for start in range(0, len(self.prompts), size)]

    def ids(self) -> list[list[int]]:
        """The same random prompts each time."""
        generator = torch.Generator().manual_seed(1)
        size = self.shape.vocabulary
        return [torch.randint(3, size, (n,), generator=generator).tolist() for n in self.prompts]

    def theory(self) -> float:
        """The ratio of floating-point operations, `generate` over shared prompts.

        `generate` reads a prompt for each row, padded, and goes on until the last of a batch ends.
        """
        body, pair = self.shape.body_parameters, 2 * self.shape.hidden * self.shape.layers
        head = self.shape.hidden * self.shape.vocabulary

        def row(prompt: int, length: int) -> float:
            seen = length * prompt + length**2 / 2
            return length * (body + head) + seen * pair

        def reading(prompt: int) -> float:
            return prompt * body + prompt**2 / 2 * pair

        plain = shared = 0.0
        for batch in self.batches:
            prompt = max(self.prompts[batch])
            longest = max(length for lengths in self.lengths[batch] for length in lengths)
            rows = len(self.prompts[batch]) * self.count
            plain += rows * (reading(prompt) + row(prompt, longest))
        for prompt, lengths in zip(self.prompts, self.lengths, strict=True):
            shared += reading(prompt) + sum(row(prompt, length) for length in lengths)
        return plain / shared


def _one(shape: Shape) -> Rollout:
    return Rollout(shape, (shape.prompt,), (shape.responses,), len(shape.responses))


def _many(shape: Shape, num_prompts: int, max_rows: int) -> Rollout:
    """Prompts from a third of the length on; lengths that scatter as real ones do."""
    source = random.Random(0)
    count, shortest = len(shape.responses), shape.prompt // 3
    step = (shape.prompt - shortest) / (num_prompts - 1)
    prompts = tuple(round(shape.prompt - step * place) for place in range(num_prompts))

    def length() -> int:
        drawn = source.lognormvariate(math.log(shape.responses[0]), 0.8)
        return max(4, min(4 * shape.responses[0], round(drawn)))

    lengths = tuple(tuple(length() for _ in range(count)) for _ in prompts)
    return Rollout(shape, prompts, lengths, max_rows)


CASES = {
    "R1": _one(Shape(512, 8, 8192, 256, (64,) * 8)),
    "R2": _one(Shape(512, 8, 8192, 256, (16, 27, 39, 50, 62, 73, 85, 96))),
    "R3": _one(Shape(256, 4, 32768, 512, (64,) * 8)),
    "R4": _one(Shape(256, 4, 8192, 256, (16, 32, 48, 64, 80, 96, 112, 128))),
    "R5": _many(Shape(512, 8, 8192, 192, (32,) * 4), 8, 8),
}
GOALS = {"R1": 1.8, "R2": 1.9}
ROUNDS = {"R3": 2, "R4": 2, "R5": 1}


@dataclass(frozen=True)
class EndsWhere:
    """A chooser that ends every response at its length, and draws the other tokens."""

    lengths: Sequence[Sequence[int]]
    inner: ByParams

    def __call__(
        self, logits: Tensor, rows: Sequence[Row], seen: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The logits of the end made impossible, or all others."""
        ends = [self.lengths[row.job][row.sample] <= len(row.token_ids) + 1 for row in rows]
        return self.inner(_with_ends(logits, ends), rows, seen)


def _with_ends(logits: Tensor, ends: Sequence[bool]) -> Tensor:
    logits = logits.clone()
    logits[:, END] = -torch.inf
    if any(ends):
        places = [place for place, is_end in enumerate(ends) if is_end]
        logits[places] = -torch.inf
        logits[places, END] = 0.0
    return logits


class IdCodec:
    """A codec whose prompts are ids already, and whose texts are empty."""

    pad_id, end_ids = PAD, frozenset([END])

    def __init__(self, prompts: Sequence[list[int]]) -> None:
        self.prompts = prompts

    def encode_prompt(self, prompt: CandidateSet, room: int | None) -> list[int]:
        return self.prompts[int(prompt.id)]

    def stop_strings(self, prompt: CandidateSet) -> tuple[str, ...]:
        return ()

    def decode_response(self, *args: object) -> str:
        return ""

    def decode_tail(self, ids: Sequence[int]) -> str:
        return ""


class Peers:
    """All ways to write the responses of a case; each returns samples, or sequences of ids."""

    def __init__(self, case: Rollout) -> None:
        self.case, self.prompts = case, case.ids()
        self.model = case.shape.model().eval()
        self.model.generation_config.eos_token_id = END
        self.model.generation_config.pad_token_id = PAD
        self.params = SamplingParams(num_return_sequences=case.count, max_new_tokens=case.longest)
        self.engine = LocalEngine(self.model, IdCodec(self.prompts), case.max_rows)  # type: ignore[arg-type]
        self.sets = [CandidateSet(str(place), "") for place in range(len(self.prompts))]
        self.paged: Any = None

    def generate(self) -> list[list[list[int]]]:
        """Transformers, prompts padded on the left."""
        found: list[list[list[int]]] = []
        for batch in self.case.batches:
            prompts, lengths = self.prompts[batch], self.case.lengths[batch]
            width = max(len(ids) for ids in prompts)
            rows = torch.tensor([[PAD] * (width - len(ids)) + ids for ids in prompts])
            every = [length for row in lengths for length in row]
            ends = _EndAt(width, every)
            written = self.model.generate(
                rows,
                attention_mask=(rows != PAD).long(),
                do_sample=True,
                top_k=0,
                num_return_sequences=self.case.count,
                max_new_tokens=max(every),
                logits_processor=LogitsProcessorList([ends]),
            )[:, width:].tolist()
            cut = [ids[:length] for ids, length in zip(written, every, strict=True)]
            found += [cut[i : i + self.case.count] for i in range(0, len(cut), self.case.count)]
        return found

    def generate_onednn(self) -> list[list[list[int]]]:
        with torch.no_grad(), fast_linears(self.model, pack=True):
            return self.generate()

    def shared_prompt(self) -> list[list[Sample]]:
        self.engine.chooser = self._ending  # type: ignore[method-assign]
        try:
            return answers(self.engine, self.sets, self.params)
        finally:
            del self.engine.chooser

    def shared_prompt_mkl(self) -> list[list[Sample]]:
        with patch.object(onednn_linear, "gains_here", lambda: False):
            return self.shared_prompt()

    def fixed_batches(self) -> list[list[Any]]:
        """Shared prompts and oneDNN, but rows begin together."""
        with in_place(self.model), fast_linears(self.model, pack=True):
            return self._looped(_FixedBatches(self.model))

    def plain(self) -> list[list[Any]]:
        """The past of prompts repeated, grown in place; MKL's products."""
        return self._looped(IncrementalModel(self.model, PAD))

    def generate_batch(self) -> list[list[list[int]]]:
        """Transformers' continuous batching: forks of a request, or requests with own budgets."""
        if self.paged is None:
            self.paged = self.case.shape.model().eval()
        blocks = math.ceil((max(self.case.prompts) + self.case.longest) / 64)
        settings: dict[str, Any] = {
            "generation_config": GenerationConfig(
                max_new_tokens=self.case.longest, do_sample=True, top_k=0, eos_token_id=-1
            ),
            "continuous_batching_config": ContinuousBatchingConfig(
                num_blocks=2 * blocks * self.case.max_rows,
                page_size=64,
                max_batch_tokens=512,
                use_cuda_graph=False,
            ),
        }
        found: list[list[list[int]]] = [[] for _ in self.prompts]
        if len({length for lengths in self.case.lengths for length in lengths}) == 1:
            settings["generation_config"].num_return_sequences = self.case.count
            results = self.paged.generate_batch(self.prompts, **settings)
            for result in results.values():
                place = self.prompts.index(list(result.prompt_ids))
                found[place].append(list(result.generated_tokens))
            return found
        wanted: dict[str, tuple[int, int]] = {}
        written: dict[tuple[int, int], list[int]] = {}
        with self.paged.continuous_batching_context_manager(
            **settings, block=True, timeout=5
        ) as manager:
            for place, ids in enumerate(self.prompts):
                for sample, length in enumerate(self.case.lengths[place]):
                    wanted[manager.add_request(ids, max_new_tokens=length)] = place, sample
            while len(written) < len(wanted):
                result = manager.get_result(timeout=1)
                if result is not None and result.request_id in wanted:
                    written[wanted[result.request_id]] = list(result.generated_tokens)
        for (place, _), tokens in sorted(written.items()):
            found[place].append(tokens)
        return found

    def _ending(self, params: SamplingParams, end_ids: frozenset[int]) -> EndsWhere:
        return EndsWhere(self.case.lengths, ByParams(params, end_ids))

    @torch.no_grad()
    def _looped(self, decoder: Decoder) -> list[list[Any]]:
        ends = self._ending(self.params, frozenset([END]))
        jobs = [
            Job(prompt, ids, (), self.case.count)
            for prompt, ids in zip(self.sets, self.prompts, strict=True)
        ]
        loop = RowLoop(jobs, self.params, frozenset([END]), lambda ids, stops: False, ends)
        found = dict(loop.run(decoder, self.case.max_rows))
        return [found[place] for place in range(len(jobs))]

    @torch.no_grad()
    def check(self, name: str) -> dict[str, float]:
        """By how much the log-probs of a variant differ from those of a plain forward.

        Raises:
            AssertionError: by more than rounding, or the lengths are not those of the case.
        """
        worst = 0.0
        for prompt, ids, samples in zip(
            self.case.lengths, self.prompts, getattr(self, name)(), strict=True
        ):
            tokens = [getattr(s, "token_ids", s) for s in samples]
            assert [len(one) for one in tokens] == list(prompt), f"{name}: other lengths"
            for sample in samples:
                if isinstance(sample, list):
                    continue
                written = sample.token_ids
                logits = self.model(torch.tensor([ids + written.tolist()])).logits[0]
                logits = logits[len(ids) - 1 : -2]  # the last token was not drawn
                logits[:, END] = -torch.inf
                expected = logits.log_softmax(-1).gather(-1, written[:-1, None])[:, 0]
                off = (sample.logprobs[:-1] - expected).abs() / expected.abs().clamp_min(1)
                worst = max(worst, float(off.max()))
        assert worst <= 1e-5, f"{name}: log-probs off by {worst:.1e}"
        return {"logprobs": worst}

    @torch.no_grad()
    def require_greedy_equal(self) -> None:
        """The engine's greedy responses are those of `generate`, token for token."""
        length = max(self.case.lengths[0])
        greedy = SamplingParams(
            num_return_sequences=1, do_sample=False, max_new_tokens=length, min_new_tokens=length
        )
        found = answers(self.engine, self.sets, greedy)
        for ids, (sample,) in zip(self.prompts, found, strict=True):
            expected = self.model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                do_sample=False,
                max_new_tokens=length,
                min_new_tokens=length,
            )[0, len(ids) :].tolist()
            assert sample.token_ids.tolist() == expected, "greedy tokens differ from generate's"


class _EndAt:
    """The same for `generate`."""

    def __init__(self, prompt_width: int, lengths: Sequence[int]) -> None:
        self.prompt_width, self.lengths = prompt_width, lengths

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        written = ids.shape[1] - self.prompt_width
        return _with_ends(logits, [length <= written + 1 for length in self.lengths])


class _FixedBatches(SharedPromptModel):
    can_join = False

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        self.release(list(self._place))
        return super().read(prompts)


VARIANTS = (
    "shared_prompt",
    "shared_prompt_mkl",
    "generate_onednn",
    "fixed_batches",
    "plain",
    "generate_batch",
)


def run(case: str, rounds: int, variants: Sequence[str] = ()) -> dict[str, Any]:
    """Compare, then time.

    Raises:
        AssertionError: greedy tokens or log-probs are not those of the model.
    """
    torch.set_num_threads(1)
    peers = Peers(CASES[case])
    peers.require_greedy_equal()
    asked = list(variants) or [v for v in VARIANTS if v != "fixed_batches" or case == "R5"]
    notes: dict[str, str] = {}
    differences: dict[str, dict[str, float]] = {}
    for name in list(asked):
        try:
            differences[name] = peers.check(name)
        except Exception as error:
            if name != "generate_batch":  # the one that is not ours
                raise
            notes[name] = f"does not run here: {type(error).__name__}: {error}"
            asked.remove(name)
    calls: dict[str, Callable[[], object]] = {"generate": peers.generate}
    calls |= {name: getattr(peers, name) for name in asked}
    return {
        "benchmark": "generation",
        "case": case,
        "shape": CASES[case],
        "theory": CASES[case].theory(),
        "relative_differences": differences,
        "timings": timed(calls, rounds),
        "notes": notes,
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    head = f"{result['case']}: {result['shape']}; FLOP ratio {result['theory']:.2f}"
    notes = [f"  {name}: {note}" for name, note in result["notes"].items()]
    return "\n".join([head, lines(result["timings"], result["relative_differences"]), *notes])
