"""The benchmark against vLLM: lengths as asked for, and a reason where vLLM is absent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import sampler_vllm
from benchmarks.generation import END
from benchmarks.harness import NotMeasured
from benchmarks.sampler_vllm import CASES, EndsAt, Job, Vllm
from rrhf.generation.engine import SamplingParams
from rrhf.generation.local.row_loop import Row


def test_lengths_of_a_case_are_the_same_each_time_and_scatter_if_ragged():
    for job in CASES.values():
        lengths = job.lengths()
        assert lengths == job.lengths()
        assert len(lengths) == job.prompts and {len(row) for row in lengths} == {job.samples}
        assert (len({n for row in lengths for n in row}) > 1) == job.is_ragged


def test_a_response_ends_at_its_length_and_nowhere_else():
    params = SamplingParams(num_return_sequences=1, do_sample=False, max_new_tokens=3)
    ends = EndsAt([[1], [3]], params, frozenset())
    logits = torch.zeros(2, 5)
    logits[:, END] = 9.0
    rows = [Row(0, 0), Row(1, 0)]
    tokens, _ = ends(logits, rows, None)
    assert tokens.tolist() == [END, END + 1]


@pytest.mark.parametrize(
    ("named", "says"), [({}, "--vllm_python"), ({"vllm_python": "python"}, "--smollm2 and --hh")]
)
def test_without_vllm_model_or_prompts_it_says_what_to_name(named: dict[str, str], says: str):
    with pytest.raises(NotMeasured, match=says):
        sampler_vllm.run("even_float32", 1, **named)


def test_a_python_without_vllm_is_not_measured(tmp_path: Path):
    with pytest.raises(NotMeasured, match="vLLM ended with 1"):
        Vllm(sys.executable, {"model": str(tmp_path)}, {})


def test_responses_of_other_lengths_are_refused():
    job = Job("float32", 1, 1, 4)
    with pytest.raises(AssertionError, match="other lengths"):
        sampler_vllm._distance(job, None, [[5]], [[([5, 5], [0.0, 0.0])]])  # type: ignore[arg-type]
