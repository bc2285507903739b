"""Generates the responses of a row with any engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from rrhf.generation.engine import GenerationEngine, Sample, SamplingParams, responses
from rrhf.progress import Progress
from rrhf.records import Candidate, CandidateSet

_PROMPTS_AT_A_TIME = 128


def write_responses(
    name: str, engine: GenerationEngine, prompts: Sequence[CandidateSet], params: SamplingParams
) -> list[list[Sample]]:
    """Generate the samples of each prompt; progress is shown under the row's name."""
    samples: dict[int, list[Sample]] = {}
    tokens, started = 0, time.monotonic()
    with Progress(f"responses of {name}", len(prompts), "prompt") as progress:
        for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
            part = prompts[start : start + _PROMPTS_AT_A_TIME]
            for place, written in responses(engine, part, params):
                samples[start + place] = written
                tokens += sum(sample.num_tokens for sample in written)
                rate = tokens / max(time.monotonic() - started, 1e-9)
                progress.advance(figures=f"{rate:.4g} tokens/s" if tokens else "")
    return [samples[place] for place in range(len(prompts))]


def as_sets(
    name: str, prompts: Sequence[CandidateSet], samples: Sequence[Sequence[Sample]]
) -> list[CandidateSet]:
    """Return the prompts with their samples as candidates, without samples that failed."""
    return [
        replace(
            s,
            candidates=tuple(
                Candidate(sample.text, f"policy:{name}", finish_reason=sample.finish_reason)
                for sample in written
                if not sample.failure
            ),
        )
        for s, written in zip(prompts, samples, strict=True)
    ]
