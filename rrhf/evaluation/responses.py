"""Samples the responses of a row, and computes their log-probs under the reference.

Any engine will do. One that can say how it encodes a prompt and has a codec (the local one) also
gives `kl`; without them, `kl` is not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rrhf.evaluation.divergence import divergence_measures, expectation_note
from rrhf.evaluation.draft import Draft
from rrhf.evaluation.likelihoods import LikelihoodReader, Row
from rrhf.generation.engine import GenerationEngine, Sample, SamplingParams
from rrhf.progress import Progress
from rrhf.records import Candidate, CandidateSet

_PROMPTS_AT_A_TIME = 128


def write_responses(
    name: str, engine: GenerationEngine, prompts: Sequence[CandidateSet], params: SamplingParams
) -> list[list[Sample]]:
    """The samples of every prompt, with its progress under the row's name."""
    samples: list[list[Sample]] = []
    with Progress(f"responses of {name}", len(prompts), "prompt") as progress:
        for start in range(0, len(prompts), _PROMPTS_AT_A_TIME):
            part = prompts[start : start + _PROMPTS_AT_A_TIME]
            samples += engine.generate(part, params)
            progress.advance(len(part))
    return samples


def as_sets(
    name: str, prompts: Sequence[CandidateSet], samples: Sequence[Sequence[Sample]]
) -> list[CandidateSet]:
    """The prompts with their samples as candidates."""
    return [
        replace(
            s,
            candidates=tuple(
                Candidate(sample.text, f"policy:{name}", finish_reason=sample.finish_reason)
                for sample in written
            ),
        )
        for s, written in zip(prompts, samples, strict=True)
    ]


def engine_prompt_ids(
    engine: Any, prompts: Sequence[CandidateSet], params: SamplingParams
) -> list[list[int]] | None:
    """The prompts as the engine encoded them; None where it cannot say."""
    encode = getattr(engine, "encode_prompt", None)
    if encode is None:
        return None
    encoded = [encode(s, params) for s in prompts]
    return None if any(ids is None for ids in encoded) else encoded


def measure_divergence(
    draft: Draft,
    reference: LikelihoodReader,
    engine: Any,
    prompts: Sequence[CandidateSet],
    params: SamplingParams,
    samples: Sequence[Sequence[Sample]],
) -> None:
    """Add `kl` and `kl_k3` on the sampled tokens, or a note why they cannot be computed."""
    prompt_ids = engine_prompt_ids(engine, prompts, params)
    codec = getattr(engine, "codec", None)
    if prompt_ids is None or codec is None:
        return
    if not reference.has_vocabulary_of(codec):
        draft.notes.append("no kl: policy and reference have different vocabularies")
        return
    rows: list[Row] = [
        (ids, sample.token_ids.tolist())
        for ids, written in zip(prompt_ids, samples, strict=True)
        for sample in written
    ]
    if not all(reference.fits(row) for row in rows):
        draft.notes.append("no kl: responses do not fit into the reference's window")
        return
    known = draft.reference_logprobs if params.temperature == 1.0 else {}
    read = iter(reference.read(rows, params.temperature, known))
    draft.cost.count_passes("reference", len(known))
    draft.measures |= divergence_measures(
        [s.id for s in prompts],
        [[sample.logprobs for sample in written] for written in samples],
        [[next(read) for _ in written] for written in samples],
    )
    note = expectation_note(params)
    draft.notes += [note] if note else []
