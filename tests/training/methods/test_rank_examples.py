"""What candidate sets become as training rows, and how what is left out is counted."""

import random
from typing import Any

import pytest
from tiny import byte_level_tokenizer

from rrhf.data.chat_format import ChatCodec
from rrhf.records import Candidate, CandidateSet
from rrhf.training.methods.fitting import RowFitter
from rrhf.training.methods.rank_examples import (
    RankEncoder,
    cut_at_next_speaker,
    is_provided,
    with_scores_of_marks,
)


@pytest.fixture(scope="module")
def codec() -> ChatCodec:
    return ChatCodec(byte_level_tokenizer(bos=False))


def group(*candidates: Candidate, query: str = "\n\nHuman: ask\n\nAssistant:") -> CandidateSet:
    return CandidateSet("id", query, None, candidates)


def scored(*responses: str) -> list[Candidate]:
    return [Candidate(text, score=float(place)) for place, text in enumerate(responses)]


def rank_encoder(
    codec: ChatCodec,
    model_max_length: int,
    max_response_tokens: int | None = None,
    long_responses: str = "cut",
    **options: Any,
) -> RankEncoder:
    fitter = RowFitter(codec, model_max_length, max_response_tokens, long_responses)
    return RankEncoder(fitter, **options)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("plain", "plain"),
        (" blanks stay ", " blanks stay "),
        (" cut \n\nHuman: more", "cut"),
        ("a\n\nAssistant: b\n\nHuman: c", "a"),
        ("lower\n\nhuman: c", "lower"),
        ("lower\n\nassistant:", "lower"),
        ("\n\nHuman: all", ""),
        ("a\nHuman: stays", "a\nHuman: stays"),
    ],
)
def test_stop_response_table(response: str, expected: str) -> None:
    assert cut_at_next_speaker(response) == expected


def test_a_stopped_response_counts_as_finished(codec: ChatCodec) -> None:
    encoder = rank_encoder(codec, 64, stop_response=True)
    cut = Candidate(" a garden\n\nHuman: fold", score=1.0, finish_reason="length")
    whole = Candidate(" a garden", score=0.0, finish_reason="length")
    example = encoder(group(cut, whole))
    assert example is not None
    assert list(example.response_ids[0]) == [*codec._encode("a garden"), codec.end_id]
    assert list(example.response_ids[1]) == codec._encode(" a garden")
    assert encoder.counts["responses_stopped"] == 1


def test_provided_by_source_or_else_the_last_two() -> None:
    named = group(
        Candidate("a", source="human:chosen"),
        Candidate("b", source="policy:x"),
        Candidate("c", source="human:rejected"),
    )
    assert is_provided(named) == [True, False, True]
    partly = group(Candidate("a", source="human:chosen"), Candidate("b"), Candidate("c"))
    assert is_provided(partly) == [True, False, False]
    unnamed = group(*scored("a", "b", "c", "d"))
    assert is_provided(unnamed) == [False, False, True, True]
    assert is_provided(group(*scored("a"))) == [True]


def test_only_use_provide_and_only_use_sample(codec: ChatCodec) -> None:
    candidates = group(*scored("a", "fold", "please", "garden"))
    provided = rank_encoder(codec, 64, only_use_provide=True)(candidates)
    sampled = rank_encoder(codec, 64, only_use_sample=True)(candidates)
    assert provided is not None and sampled is not None
    assert provided.scores == [2.0, 3.0] and sampled.scores == [0.0, 1.0]
    encoder = rank_encoder(codec, 64, only_use_sample=True)
    assert encoder(group(*scored("a", "fold"))) is None
    assert encoder.counts["prompts_without_candidates"] == 1


def test_an_unscored_preference_pair_is_a_group_of_two(codec: ChatCodec) -> None:
    pair = [Candidate("a", "human:rejected"), Candidate("fold", "human:chosen")]
    example = rank_encoder(codec, 64)(group(*pair))
    assert example is not None and example.scores == [0.0, 1.0]
    scored_pair = group(*[Candidate(c.response, c.source, 2.0) for c in pair])
    assert with_scores_of_marks(scored_pair) is scored_pair
    alone = group(pair[0])
    assert with_scores_of_marks(alone) is alone


def test_candidates_without_score_go_after_positions_are_known(codec: ChatCodec) -> None:
    candidates = [*scored("a", "fold"), Candidate("please"), Candidate("garden", score=9.0)]
    encoder = rank_encoder(codec, 64, only_use_provide=True)
    example = encoder(group(*candidates))
    assert example is not None and example.scores == [9.0]
    assert encoder.counts["candidates_without_score"] == 1
    assert encoder.counts["prompts_with_one_candidate"] == 1


def test_everything_is_counted(codec: ChatCodec) -> None:
    encoder = rank_encoder(codec, 64)
    tied = [Candidate(text, score=0.5) for text in ("a", "fold")]
    empty_and_cut = Candidate("", score=3.0, finish_reason="length")
    for candidates in (scored("a", "fold"), tied, scored("a"), [], [*scored("a"), empty_and_cut]):
        encoder(group(*candidates))
    assert dict(encoder.counts) == {
        "prompts": 5,
        "prompts_used": 4,
        "candidates_used": 6,
        "prompts_all_tied": 1,
        "prompts_with_one_candidate": 2,
        "prompts_without_candidates": 1,
        "responses_cut_to_nothing": 1,
    }


def test_scores_stay_with_their_responses(codec: ChatCodec) -> None:
    long = " garden" * 40
    example = rank_encoder(codec, 24, long_responses="drop")(group(*scored(long, " fold")))
    assert example is not None and example.scores == [1.0]
    assert example.response_ids[0][-1] == codec.end_id


def test_the_same_set_gives_the_same_example_each_time(codec: ChatCodec) -> None:
    encoder = rank_encoder(codec, 24)
    candidates = group(*scored(" garden" * 40, " fold"))
    assert encoder(candidates) == encoder(candidates)


# The released program's rows.


def test_released_rows_cut_the_prompt_on_the_right(codec: ChatCodec) -> None:
    query = "\n\nHuman: garden fold please\n\nAssistant:"
    whole = codec.tokenizer(query).input_ids
    limit = len(whole) - 2
    encoder = rank_encoder(codec, limit, released=True)
    example = encoder(group(*scored(" a", " fold fold fold"), query=query))
    assert example is not None
    assert list(example.prompt_ids) == whole[:limit]  # the cue is gone
    # No room is left, which the original takes for no limit: the rows are longer than the limit.
    assert list(example.response_ids[1]) == codec.tokenizer(" fold fold fold</s>").input_ids
    assert limit + len(example.response_ids[1]) > limit
    assert encoder.counts["prompts_cut"] == 1 and encoder.counts["responses_cut"] == 0


def test_released_responses_are_cut_to_the_rest_and_lose_their_end(codec: ChatCodec) -> None:
    query = "\n\nHuman: fold\n\nAssistant:"
    length = len(codec.tokenizer(query).input_ids) + 3
    example = rank_encoder(codec, length, released=True)(
        group(*scored(" garden garden garden garden garden"), query=query)
    )
    assert example is not None and len(example.response_ids[0]) == 3
    assert codec.end_id not in example.response_ids[0]


def test_released_rows_parse_special_tokens_and_carry_an_inner_bos() -> None:
    codec = ChatCodec(byte_level_tokenizer(bos=True))
    assert codec.bos_id is not None
    candidates = group(*scored(" fold", " say </s> now"))
    released = rank_encoder(codec, 64, released=True)(candidates)
    own = rank_encoder(codec, 64)(candidates)
    assert released is not None and own is not None
    for ids in released.response_ids:
        assert ids[0] == codec.bos_id and ids[-1] == codec.end_id
    assert list(released.response_ids[1]).count(codec.end_id) == 2
    for ids in own.response_ids:
        assert codec.bos_id not in ids and list(ids).count(codec.end_id) == 1
    assert own.prompt_ids[0] == released.prompt_ids[0] == codec.bos_id


def test_released_rows_beyond_the_models_window_are_counted(codec: ChatCodec) -> None:
    encoder = rank_encoder(codec, 16, released=True, window=32)
    long_query = "\n\nHuman: " + "garden " * 30 + "\n\nAssistant:"
    assert encoder(group(*scored(" fold" * 40), query=long_query)) is None
    assert encoder.counts["prompts_beyond_the_window"] == 1


@pytest.mark.parametrize("long_responses", ["cut", "drop"])
@pytest.mark.parametrize("released", [False, True])
def test_a_set_is_told_to_have_an_example_where_it_has_one(
    codec: ChatCodec, released: bool, long_responses: str
) -> None:
    draw = random.Random(0)
    options = {"only_use_sample": True, "stop_response": True, "released": released, "window": 40}
    telling, encoding = (rank_encoder(codec, 32, None, long_responses, **options) for _ in range(2))
    for _ in range(200):
        candidates = [
            Candidate(
                draw.choice(["", " a", " garden" * 12, " a\n\nHuman: fold"]),
                draw.choice(["", "human:chosen", "policy:x"]),
                draw.choice([None, 1.0, 2.0]),
                draw.choice(["length", "stop"]),
            )
            for _ in range(draw.randrange(4))
        ]
        one = group(*candidates, query=draw.choice(["", "ask", "ask " * 30]))
        assert telling.yields(one) == (encoding(one) is not None)
    for name in ("prompts", "prompts_used", "prompts_without_candidates", "responses_stopped"):
        assert telling.counts[name] == encoding.counts[name] > 0


def test_other_rows_and_limits_have_another_identity(codec: ChatCodec) -> None:
    one = rank_encoder(codec, 32)
    assert one.identity("a") == rank_encoder(codec, 32).identity("a")
    others = [rank_encoder(codec, 33), rank_encoder(codec, 32, stop_response=True)]
    assert len({one.identity("a"), one.identity("b"), *(o.identity("a") for o in others)}) == 4
