"""The same prompts in each step, for one process and for many, straight and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest

from rrhf.data.collate import EncodedSet, TokenBatch
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.training.core.streams import EncodedExamples, OfflineStream, StepCut

EXAMPLES = [EncodedSet([100 + i] * (i % 5 + 1), [[i, 1]]) for i in range(23)]


def stream(**changes: Any) -> OfflineStream:
    sizes: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    sizes |= {one.name: changes.pop(one.name) for one in fields(StepCut) if one.name in changes}
    return OfflineStream(
        EXAMPLES, StepCut(0, **sizes), **{"num_train_epochs": 2, "seed": 3, **changes}
    )


def prompts_of(batches: Sequence[TokenBatch]) -> list[int]:
    return [
        int(batch.prompt_ids[i, -1])
        for batch in batches
        for i in range(batch.num_prompts)
        if batch.prompt_weights[i] > 0
    ]


def test_no_pass_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="--num_train_epochs 0: must be above 0"):
        stream(num_train_epochs=0)
    assert stream(num_train_epochs=0, max_steps=3).total_steps == 3


def test_each_epoch_sees_each_example_once_in_its_own_order() -> None:
    steps = [prompts_of(batches) for batches in stream()]
    assert len(steps) == stream().total_steps == 12
    first, second = [i for s in steps[:6] for i in s], [i for s in steps[6:] for i in s]
    assert sorted(first) == sorted(second) == sorted(e.prompt_ids[-1] for e in EXAMPLES)
    assert first != second
    assert [len(s) for s in steps[:6]] == [4, 4, 4, 4, 4, 3]


@pytest.mark.parametrize("group_by_length", [False, True])
def test_two_ranks_share_the_steps_of_one(group_by_length: bool) -> None:
    one = list(stream(group_by_length=group_by_length))
    ranks = [
        list(
            stream(
                rank=r,
                world_size=2,
                gradient_accumulation_steps=1,
                group_by_length=group_by_length,
            )
        )
        for r in (0, 1)
    ]
    for whole, left, right in zip(one, *ranks, strict=True):
        assert len(left) == len(right)
        assert sorted(prompts_of(whole)) == sorted(prompts_of(left) + prompts_of(right))


def test_a_short_rank_gets_a_filler_of_weight_zero() -> None:
    short = stream(rank=7, world_size=8, gradient_accumulation_steps=1)
    last = list(short)[1]
    assert prompts_of(last) == [] and last[0].num_prompts == 1


def test_grouping_puts_equal_lengths_together() -> None:
    widths = [[b.prompt_ids.shape[1] for b in step] for step in stream(group_by_length=True)]
    waste = sum(max(w) - min(w) for w in widths)
    plain = [[b.prompt_ids.shape[1] for b in step] for step in stream()]
    assert waste < sum(max(w) - min(w) for w in plain)


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 11])
def test_resumed_goes_on_where_it_stopped(stop: int) -> None:
    straight = [prompts_of(batches) for batches in stream(group_by_length=True)]
    first = stream(group_by_length=True)
    begun = [prompts_of(batches) for batches, _ in zip(first, range(stop), strict=False)]
    state = first.state_dict()
    assert len(begun) == stop
    again = stream(group_by_length=True)
    again.load_state_dict({**state, "step": stop})
    assert begun + [prompts_of(batches) for batches in again] == straight


def test_what_must_not_change_on_resume_is_refused() -> None:
    state = stream().state_dict()
    for changes in ({"seed": 4}, {"per_device_train_batch_size": 4}, {"world_size": 2}):
        with pytest.raises(UserError, match="in the checkpoint and is"):
            stream(**changes).load_state_dict(state)


def test_as_many_other_examples_are_refused_on_resume() -> None:
    state = stream().state_dict()
    others = [*EXAMPLES[1:], EXAMPLES[0]]
    again = OfflineStream(others, StepCut(0, 2, 2), 2, seed=3)
    with pytest.raises(UserError, match="23 training examples are not those of the checkpoint"):
        again.load_state_dict(state)
    del state["lengths_sha256"]  # as runs that began before it was kept have it
    again.load_state_dict(state)


def test_max_steps_and_fractions_of_an_epoch() -> None:
    assert len(list(stream(max_steps=5))) == 5
    assert stream(num_train_epochs=0.5).total_steps == 3
    with pytest.raises(UserError, match="per_device_train_batch_size 0"):
        stream(per_device_train_batch_size=0)


def test_examples_are_encoded_on_demand_and_empty_ones_left_out() -> None:
    sets = [CandidateSet(str(i), "x" * i) for i in range(6)]

    def encode(candidate_set: CandidateSet) -> EncodedSet | None:
        length = len(candidate_set.query)
        return EncodedSet([1] * length, [[2]]) if length % 2 else None

    examples = EncodedExamples(sets, encode)
    assert [len(e.prompt_ids) for e in examples] == [1, 3, 5]
    assert examples.lengths is not None and list(examples.lengths) == [2, 4, 6]
    with pytest.raises(UserError, match="none of the 1 prompts"):
        EncodedExamples(sets[:1], encode)


def test_examples_that_are_told_without_encoding_are_encoded_when_they_are_used() -> None:
    sets = [CandidateSet(str(i), "x" * i) for i in range(6)]
    encoded: list[str] = []

    def encode(candidate_set: CandidateSet) -> EncodedSet:
        encoded.append(candidate_set.id)
        return EncodedSet([1] * len(candidate_set.query), [[2]])

    def yields(candidate_set: CandidateSet) -> bool:
        return len(candidate_set.query) % 2 == 1

    examples = EncodedExamples(sets, encode, yields, "the data")
    assert (len(examples), examples.lengths, encoded) == (3, None, [])
    short = OfflineStream(examples, StepCut(0, 1), max_steps=1)
    [[batch]] = list(short)
    assert encoded == [str(int(batch.prompt_lengths[0]))]
    assert short.state_dict()["lengths_sha256"] is None and len(encoded) == 1
    with pytest.raises(UserError, match="none of the 1 prompts"):
        EncodedExamples(sets[:1], encode, yields)


def test_a_run_that_encodes_as_it_goes_knows_the_data_of_its_checkpoint() -> None:
    sets = [CandidateSet(str(i), "x" * (i + 1)) for i in range(6)]

    def stream_of(sets: list[CandidateSet], identity: str, is_quick: bool) -> OfflineStream:
        def encode(candidate_set: CandidateSet) -> EncodedSet:
            return EncodedSet([1] * len(candidate_set.query), [[2]])

        examples = EncodedExamples(sets, encode, (lambda _: True) if is_quick else None, identity)
        return OfflineStream(examples, StepCut(0, 1), max_steps=1)

    for was_quick, is_quick in ((True, True), (True, False), (False, True), (False, False)):
        state = stream_of(sets, "these", was_quick).state_dict()
        stream_of(sets, "these", is_quick).load_state_dict(state)
        with pytest.raises(UserError, match="6 training examples are not those"):
            stream_of(sets[::-1], "others", is_quick).load_state_dict(state)
    del state["examples_identity"]  # as runs have it that began before it was kept
    stream_of(sets, "these", True).load_state_dict(state)
    with pytest.raises(UserError, match="6 training examples are not those"):
        stream_of(sets[::-1], "others", True).load_state_dict(state)
