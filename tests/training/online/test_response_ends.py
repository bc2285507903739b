"""Where responses are cut, and which of them are loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import build_world, settings
from rollout_cases import prompts, writer
from tiny import byte_level_tokenizer

from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.models.loading import load_tokenizer
from rrhf.training.online import ppo
from rrhf.training.online.experience import build_experience
from rrhf.training.online.response_ends import StopToken, is_loop


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def test_the_first_stop_token_at_or_after_the_place_is_the_last_that_stays() -> None:
    tokenizer = byte_level_tokenizer(400)
    (stop,) = tokenizer(".", add_special_tokens=False).input_ids
    other = max(set(tokenizer.get_vocab().values()) - {stop} - set(tokenizer.all_special_ids))
    ids = [other, stop, other, stop, other]
    for after, kept in ((0, 2), (1, 2), (2, 4), (3, 4), (4, None), (9, None)):
        assert StopToken(tokenizer, ".", after).kept(ids) == kept
    assert StopToken(tokenizer, ".").kept([other, other]) is None
    assert StopToken(tokenizer, ".").kept([]) is None


def test_blanks_beside_the_text_do_not_count() -> None:
    tokenizer = byte_level_tokenizer(400)
    stop = StopToken(tokenizer, ".")
    assert {text.strip(" ") for text in tokenizer.batch_decode([[i] for i in stop.ids])} == {"."}
    assert stop.ids == StopToken(tokenizer, " . ").ids
    assert not stop.ids & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("text", ["a long sentence.", "", "  ", "EOS"])
def test_a_text_that_is_no_token_is_refused(text: str) -> None:
    """Nor is the end itself one: a response that reaches it has ended."""
    tokenizer = byte_level_tokenizer(400)
    with pytest.raises(UserError, match="--truncate_token"):
        StopToken(tokenizer, tokenizer.eos_token if text == "EOS" else text)


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([7] * 12, True),
        ([1, 2, 3] + [7] * 12, True),
        ([7] * 11, False),  # too short to tell
        ([7] * 12 + [1, 2], False),  # it found its way out
        ([7, 8, 9] * 4, True),
        ([1, *[7, 8, 9, 10] * 4], True),
        ([7, 8, 9, 10] * 3, False),  # three times is a list
        (list(range(16)) * 4, True),
        (list(range(17)) * 4, False),  # longer stretches are not looked for
        (list(range(40)), False),
        ([], False),
    ],
)
def test_a_loop_is_the_same_few_tokens_again_and_again(ids: list[int], expected: bool) -> None:
    assert is_loop(ids) is expected


def word_within(world: Path, responses: list[list[int]]) -> str:
    """The text of a token that stands neither first nor last in some response."""
    tokenizer = load_tokenizer(world / "model")
    texts = (str(tokenizer.decode([i])) for ids in responses for i in ids[1:-1])
    return next(text for text in texts if text.strip() and text.isascii())


def test_a_rollout_is_cut_and_what_stays_is_as_it_was_sampled(world: Path) -> None:
    """At a token that one of them has in its middle; log-probs and values follow the cut."""
    plain = writer(world, num_return_sequences=2).write(prompts(world), number=1)
    codec = ChatCodec(load_tokenizer(world / "model"), "raw")
    text = word_within(world, [row.token_ids for row in plain.rows])
    changes: dict[str, Any] = {
        "num_return_sequences": 2,
        "truncate_token": text,
        "truncate_after": 1,
    }
    cut = writer(world, **changes).write(prompts(world), number=1)
    stop = StopToken(codec.tokenizer, text, 1)
    assert len(cut.rows) == len(plain.rows)
    places = [stop.kept(row.token_ids) for row in plain.rows]
    assert cut.counts["cut"] == sum(place is not None for place in places) > 0
    for before, after, place in zip(plain.rows, cut.rows, places, strict=True):
        assert after.token_ids == before.token_ids[:place]
        count = len(after.token_ids)
        torch.testing.assert_close(after.old_logprobs, before.old_logprobs[:count], atol=0, rtol=0)
        torch.testing.assert_close(  # read in batches of another width
            after.reference_logprobs, before.reference_logprobs[:count], atol=1e-5, rtol=0
        )
        assert after.values is not None and len(after.values) == count
        assert after.is_finished == (place is not None or before.is_finished)
        assert after.finish == ("stop" if place is not None else before.finish)
        assert before.text.startswith(after.text)


def test_what_was_cut_pays_no_penalty_for_its_missing_end(world: Path) -> None:
    plain = writer(world).write(prompts(world), number=1).rows
    text = word_within(world, [row.token_ids for row in plain])
    changes: dict[str, Any] = {"truncate_token": text, "missing_eos_penalty": 50.0}
    config = settings(world, "unused", method="reinforce_pp", **changes)
    rows = writer(world, **changes).write(prompts(world), number=1).rows
    rewards = build_experience(rows, config, 0.0).rewards
    for row, reward in zip(rows, rewards, strict=True):
        assert reward == pytest.approx(row.score - (0.0 if row.is_finished else 50.0), abs=1e-4)
    assert any(row.is_finished for row in rows) and not all(row.is_finished for row in rows)


def test_degenerate_answers_are_counted(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ppo.train(settings(world, run, max_new_tokens=20, num_rollouts=1))
    from trainer_cases import metrics_of

    row = next(row for row in metrics_of(run) if "looped_fraction" in row)
    assert 0 < row["unfinished_fraction"] <= 1 and row["cut_fraction"] == 0
    assert row["unfinished_fraction"] + row["finished_fraction"] == pytest.approx(1.0)
