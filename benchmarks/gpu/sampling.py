"""Responses of the sampler: greedy ones are those of `generate`, and how fast they come at 1B.

`shared_prompt` is the sampler as users have it, `generate` is transformers' own, given the same
prompts N times each. Both write every response to its full length, bfloat16, wall clock.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.generation import _Ids
from benchmarks.gpu.setting import Setting, check
from benchmarks.gpu_step import GpuCase
from benchmarks.shapes import Shape
from rrhf.generation.engine import answers
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.params import SamplingParams
from rrhf.records import CandidateSet

ROUNDS = 2
SIZES = Shape(2048, 16, 128256, 512, (128,) * 4, heads=32, key_heads=8, mlp=8192)
TINY = Shape(32, 2, 96, 9, (6,) * 3)
PROMPTS = 8
GREEDY = Shape(512, 4, 4096, 96, (32,) * 2, heads=8, key_heads=4)


def items(setting: Setting) -> list[str]:
    return ["greedy", "seeded", "shared_prompt", "generate"]


def run(item: str, setting: Setting) -> dict[str, Any]:
    return {"greedy": _greedy, "seeded": _seeded}.get(item, lambda s: _speed(item, s))(setting)


def _prompts(shape: Shape, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> list[int]:
        return torch.randint(3, shape.vocabulary, (length,), generator=generator).tolist()

    return [ids(max(2, shape.prompt * (count - place) // count)) for place in range(count)]


def _engine(model: Any, prompts: list[list[int]], rows: int) -> tuple[LocalEngine, list[Any]]:
    engine = LocalEngine(model, _Ids(prompts), rows)  # type: ignore[arg-type]
    return engine, [CandidateSet(str(place), "") for place in range(len(prompts))]


def _written(shape: Shape, **changes: Any) -> SamplingParams:
    """Every response takes all of its tokens."""
    length = shape.responses[0]
    return SamplingParams(max_new_tokens=length, min_new_tokens=length, **changes)


def _greedy(setting: Setting) -> dict[str, Any]:
    """In float32, where a tie of logits is as good as impossible."""
    shape = TINY if setting.tiny else GREEDY
    model = GpuCase(shape, dtype="float32").model(setting.device, "sdpa").eval()
    prompts = _prompts(shape, 4)
    engine, sets = _engine(model, prompts, 8)
    greedy = _written(shape, num_return_sequences=1, do_sample=False)
    found = answers(engine, sets, greedy)
    differing = 0
    for ids, (sample,) in zip(prompts, found, strict=True):
        rows = torch.tensor([ids], device=setting.device)
        expected = model.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            do_sample=False,
            max_new_tokens=greedy.max_new_tokens,
            min_new_tokens=greedy.max_new_tokens,
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        differing += sample.token_ids.tolist() != expected
    return check(not differing, f"{differing} of {len(prompts)} differ from generate's")


def _seeded(setting: Setting) -> dict[str, Any]:
    """The same draws whatever rows are written together."""
    shape = TINY if setting.tiny else GREEDY
    model = GpuCase(shape, dtype="float32").model(setting.device, "sdpa").eval()
    found = []
    for rows in (2, 16):
        engine, sets = _engine(model, _prompts(shape, 4), rows)
        samples = answers(engine, sets, _written(shape, num_return_sequences=4, seed=5))
        found.append([s.token_ids.tolist() for of_prompt in samples for s in of_prompt])
    differing = sum(a != b for a, b in zip(*found, strict=True))
    total = len(found[0])
    # A draw may fall on the border between two tokens, where rounding decides.
    return check(differing <= total // 8, f"{differing} of {total} samples depend on the batch")


@torch.no_grad()
def _speed(item: str, setting: Setting) -> dict[str, Any]:
    shape = TINY if setting.tiny else SIZES
    dtype = "float32" if setting.tiny else "bfloat16"
    model = GpuCase(shape, dtype=dtype).model(setting.device, "sdpa").eval()
    prompts = _prompts(shape, PROMPTS)
    count, length = len(shape.responses), shape.responses[0]
    if item == "shared_prompt":
        engine, sets = _engine(model, prompts, PROMPTS * count)
        params = _written(shape, num_return_sequences=count)

        def write() -> None:
            answers(engine, sets, params)
    else:
        width = max(map(len, prompts))
        rows = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
        rows = rows.to(setting.device)

        def write() -> None:
            model.generate(
                rows,
                attention_mask=(rows != 0).long(),
                do_sample=True,
                top_k=0,
                num_return_sequences=count,
                max_new_tokens=length,
                min_new_tokens=length,
                pad_token_id=0,
            )

    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(1 + ROUNDS):
        _wait(setting)
        started = time.perf_counter()
        write()
        _wait(setting)
        if number:
            seconds.append(round(time.perf_counter() - started, 4))
    peak = torch.cuda.max_memory_allocated() / 2**30 if setting.on_gpu else None
    tokens = PROMPTS * count * length
    rate = round(tokens / min(seconds))
    line = f"{rate:,} response tokens/s, {PROMPTS} prompts x {count}, {shape}"
    line += "" if peak is None else f", {peak:.1f} GiB"
    return {"line": line, "tokens_per_second": rate, "round_seconds": seconds, "peak_gib": peak}


def _wait(setting: Setting) -> None:
    if setting.on_gpu:
        torch.cuda.synchronize()
