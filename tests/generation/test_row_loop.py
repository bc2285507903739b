"""The loop over rows: who is in the batch when, and that nothing else depends on it."""

from __future__ import annotations

import random

import pytest
import torch

from rrhf.generation.engine import SamplingParams
from rrhf.generation.local.row_loop import ByParams, Job, RowLoop
from rrhf.records import CandidateSet

VOCABULARY, END = 40, 39


class Recorder:
    """A decoder whose next token follows from a row's own ids; writes down what it is asked."""

    def __init__(self, can_join: bool = True, fails_at: int | None = None) -> None:
        self.can_join, self.fails_at = can_join, fails_at
        self.prompts: dict[int, list[int]] = {}
        self.rows: list[tuple[int, list[int]]] = []
        self.batches: list[int] = []
        self.reads: list[int] = []

    def read(self, prompts):
        handles = [sum(self.reads) + place for place in range(len(prompts))]
        self.reads.append(len(prompts))
        self.prompts.update(zip(handles, prompts, strict=True))
        return handles, torch.stack([self.logits(ids) for ids in prompts])

    def release(self, handles):
        for handle in handles:
            del self.prompts[handle]

    def arrange(self, sources, handles):
        self.rows = [
            (handle, [*self.prompts[handle]] if source is None else list(self.rows[source][1]))
            for source, handle in zip(sources, handles, strict=True)
        ]
        assert [handle for handle, _ in self.rows] == list(handles)
        assert list(handles) == sorted(handles), "rows of a prompt stand side by side"

    def step(self, tokens):
        if len(self.batches) == self.fails_at:
            raise RuntimeError("DefaultCPUAllocator")
        self.batches.append(len(self.rows))
        for (_, ids), token in zip(self.rows, tokens.tolist(), strict=True):
            ids.append(token)
        return torch.stack([self.logits(ids) for _, ids in self.rows])

    @staticmethod
    def logits(ids):
        generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**40)
        return torch.randn(VOCABULARY, generator=generator) * 2


class Lengths:
    """Ends every response at a length that follows from its prompt and number."""

    def __init__(self, params) -> None:
        self.inner = ByParams(params, frozenset([END]))

    def __call__(self, logits, rows, seen):
        logits = logits.clone()
        logits[:, END] = -torch.inf
        for place, row in enumerate(rows):
            if len(row.token_ids) + 1 == length_of(row.job, row.sample):
                logits[place, END] = torch.inf
                logits[place, :END] = 0.0
        return self.inner(logits.nan_to_num(posinf=1e4), rows, seen)


def length_of(job: int, sample: int) -> int:
    return max(1, min(60, int(random.Random(f"{job} {sample}").lognormvariate(2.5, 0.8))))


def jobs_of(count: int, samples: int) -> list[Job]:
    return [
        Job(CandidateSet(str(job), "a"), [1 + job % 7] * (20 - job), (), samples)
        for job in range(count)
    ]


def written(decoder, max_rows, params, jobs, choose=None):
    choose = choose or Lengths(params)
    loop = RowLoop(jobs, params, frozenset([END]), lambda ids, stops: False, choose)
    return found(loop, decoder, max_rows, len(jobs))


def found(loop, decoder, max_rows, count):
    """Job by job, whatever order they were finished in."""
    samples = dict(loop.run(decoder, max_rows))
    return [samples[job] for job in range(count)]


def tokens_of(jobs):
    return [[sample.token_ids.tolist() for sample in job] for job in jobs]


@pytest.mark.parametrize("change", [{}, {"repetition_penalty": 1.4}, {"min_new_tokens": 5}])
def test_rows_are_the_same_in_batches_of_any_size_and_making(change):
    params = SamplingParams(max_new_tokens=60, **change)
    jobs = jobs_of(7, 3)
    choose = ByParams(params, frozenset([END]))
    whole = tokens_of(written(Recorder(), 100, params, jobs, choose))
    assert len({len(ids) for job in whole for ids in job}) > 5, "lengths differ"
    if "min_new_tokens" in change:
        assert min(len(ids) for job in whole for ids in job) > 5
    for rows in (1, 2, 4, 7):
        for can_join in (True, False):
            decoder = Recorder(can_join)
            assert tokens_of(written(decoder, rows, params, jobs, choose)) == whole
            assert max(decoder.batches) <= rows


def test_free_places_are_taken_by_the_next_rows():
    params = SamplingParams(max_new_tokens=60)
    jobs = jobs_of(8, 4)
    joining, fixed = Recorder(), Recorder(can_join=False)
    for decoder in (joining, fixed):
        for job, samples in enumerate(tokens_of(written(decoder, 8, params, jobs))):
            assert [len(ids) for ids in samples] == [length_of(job, i) for i in range(4)]
    needed = sum(length_of(job, sample) - 1 for job in range(8) for sample in range(4))
    assert len(joining.batches) < 0.75 * len(fixed.batches)
    assert sum(joining.batches) < 1.1 * needed, "finished rows hardly cost anything"
    assert sum(joining.reads) == 8, "every prompt is read once"
    assert joining.prompts == {}, "and forgotten when its last row is finished"


def test_samples_of_one_prompt_that_do_not_fit_follow_without_reading_it_again():
    params = SamplingParams(max_new_tokens=60)
    decoder = Recorder()
    (samples,) = tokens_of(written(decoder, 4, params, jobs_of(1, 13)))
    assert len(samples) == 13 and decoder.reads == [1]


def test_after_a_failure_the_rest_is_written_anew_and_what_was_finished_stays():
    params = SamplingParams(max_new_tokens=60)
    jobs = jobs_of(6, 3)
    whole = tokens_of(written(Recorder(), 8, params, jobs))
    loop = RowLoop(jobs, params, frozenset([END]), lambda ids, stops: False, Lengths(params))
    lingering, samples = [], {}
    for fails_at in (0, 3, 4):
        with pytest.raises(RuntimeError):
            samples |= loop.run(Recorder(fails_at=fails_at), 18)
        lingering += [row for row in loop._rows if row.is_done]
        assert 0 < loop.put_back() <= 18
    assert lingering, "one that was finished had not left yet"
    finished = {id(row) for rows in loop._finished for row in rows}
    for job, given in loop.run(Recorder(), 4):
        assert job not in samples, "what was given is not given again"
        samples[job] = given
    assert tokens_of(samples[job] for job in range(6)) == whole
    assert finished and finished <= {id(row) for rows in loop._finished for row in rows}


def test_a_prompt_is_given_when_its_last_sample_is_finished():
    params = SamplingParams(max_new_tokens=60)
    jobs, decoder = jobs_of(8, 4), Recorder()
    loop = RowLoop(jobs, params, frozenset([END]), lambda ids, stops: False, Lengths(params))
    steps = {job: len(decoder.batches) for job, _ in loop.run(decoder, 8)}
    assert sorted(steps) == list(range(8)) != list(steps)
    assert min(steps.values()) < len(decoder.batches) / 2


def test_prompts_of_very_different_length_are_read_apart():
    params = SamplingParams(max_new_tokens=4)
    jobs = [Job(CandidateSet(str(n), "a"), [1] * n, (), 1) for n in (40, 30, 21, 10, 5)]
    decoder = Recorder()
    written(decoder, 8, params, jobs)
    assert decoder.reads == [3, 2]
