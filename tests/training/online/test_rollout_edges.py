"""Rollouts where little things decide: zeros, limits, dropout, repeated prompts, other ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import build_world
from rollout_cases import prompts, writer
from tiny import byte_level_tokenizer

from rrhf.data.chat_format import ChatCodec
from rrhf.errors import StoppedBySignal, UserError
from rrhf.generation.engine import Sample
from rrhf.generation.fitting import Fit
from rrhf.models.forward.logprobs import Policy
from rrhf.records import CandidateSet
from rrhf.training.core.parallel import Parallel
from rrhf.training.online.experience import RolloutRow
from rrhf.training.online.prompts import fitting_prompts
from rrhf.training.online.response_ends import StopToken
from rrhf.training.online.rollout import Rollout, RolloutWriter
from rrhf.training.online.whole_copy import WholeCopy

SCORER: dict[str, Any] = {"reward_model_name_or_path": "function:ppo_cases:nothing"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def answers(rollout: Rollout) -> list[list[int]]:
    return [row.token_ids for row in rollout.rows]


def test_a_score_of_zero_is_a_score(world: Path) -> None:
    rollout = writer(world, **SCORER).write(prompts(world), number=0)
    assert len(rollout.rows) == 6 and rollout.counts["unscored"] == 0
    assert {row.score for row in rollout.rows} == {0.0}


def test_as_many_may_lack_a_score_as_the_limit_says(world: Path) -> None:
    """Two of six: a third may, and a little less may not."""
    some: dict[str, Any] = {"reward_model_name_or_path": "function:ppo_cases:some_none"}
    rollout = writer(world, **some, max_unscored_fraction=2 / 6).write(prompts(world), number=0)
    assert rollout.counts["unscored"] == 2
    with pytest.raises(UserError, match="max_unscored_fraction"):
        writer(world, **some, max_unscored_fraction=0.33).write(prompts(world), number=0)


def all_none(prompts: Any, responses: Any, messages: Any) -> list[None]:
    return [None for _ in responses]


def test_where_nothing_has_a_score_the_scorer_is_named(world: Path) -> None:
    name = "function:test_rollout_edges:all_none"
    made = writer(world, reward_model_name_or_path=name, max_unscored_fraction=1.0)
    with pytest.raises(UserError, match=f"{name}: scored none of the 6 responses") as told:
        made.write(prompts(world), number=0)
    assert "6 without a score" in str(told.value) and "are empty" not in str(told.value)


def test_each_time_that_a_prompt_occurs_it_is_answered_anew(world: Path) -> None:
    one = prompts(world)[0]
    found = answers(writer(world, **SCORER).write([one] * 4, number=0))
    assert len({tuple(ids) for ids in found}) == 4
    assert found == answers(writer(world, **SCORER).write([one] * 4, number=0))


def test_each_rollout_draws_anew(world: Path) -> None:
    write = writer(world, **SCORER).write
    first, second = (answers(write(prompts(world), number=n)) for n in (0, 1))
    assert first != second and first == answers(write(prompts(world), number=0))


def test_an_evaluation_may_ask_for_another_number_of_samples(world: Path) -> None:
    rollout = writer(world, **SCORER).write(prompts(world)[:2], number=0, samples_per_prompt=3)
    assert [(row.prompt, row.sample) for row in rollout.rows] == [
        (prompt, sample) for prompt in range(2) for sample in range(3)
    ]


def test_responses_without_a_token_are_left_out_and_counted(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer(world, **SCORER)
    generate = write._engine.generate

    def some_empty(*words: Any) -> Any:
        written = dict(generate(*words))
        written[1] = [Sample([5], torch.zeros(0, dtype=torch.long), torch.zeros(0), "stop", "")]
        return iter(written.items())

    monkeypatch.setattr(write._engine, "generate", some_empty)
    rollout = write.write(prompts(world), number=0)
    assert [row.prompt for row in rollout.rows] == [0, 2, 3, 4, 5]
    assert (rollout.counts["sampled"], rollout.counts["empty"]) == (6, 1)


def test_a_loop_is_seen_before_its_end(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = writer(world, **SCORER, truncate_token=".", num_return_sequences=1)
    end, stop = write._codec.end_id, min(write._stop_token.ids)  # type: ignore[union-attr]
    loop = Sample([5], torch.tensor([7] * 12 + [end]), torch.zeros(13), "stop", "")
    none = Sample([5], torch.tensor([7] * 11 + [end]), torch.zeros(12), "stop", "")
    long = Sample([5], torch.tensor([5, 6]), torch.zeros(2), "length", "")
    cut = Sample([5], torch.tensor([stop, 6]), torch.zeros(2), "length", "")
    written = [(place, [sample]) for place, sample in enumerate((loop, none, long, cut))]
    monkeypatch.setattr(write._engine, "generate", lambda *_: iter(written))
    rollout = write.write(prompts(world)[:4], number=0)
    assert rollout.counts == {
        **{"sampled": 4, "empty": 0, "cut": 1, "unfinished": 1, "looped": 1},
        **{"unscored": 0, "too_long_to_score": 0},
    }
    assert [row.is_finished for row in rollout.rows] == [True, True, False, True]


def test_a_prompt_that_just_fits_is_whole(world: Path) -> None:
    prompt = prompts(world)[0]
    length = len(writer(world)._codec.encode_prompt(prompt) or ())
    sizes: dict[str, Any] = {**SCORER, "max_new_tokens": 6}
    for room, is_cut in ((length + 1, False), (length, False), (length - 1, True)):
        made = writer(world, **sizes, model_max_length=room + 6)
        assert not made.fit(prompt).misfit and made.fit(prompt).is_cut is is_cut


def test_of_a_response_that_is_cut_the_scorer_reads_what_stays(world: Path) -> None:
    write = writer(world, truncate_token=".", truncate_after=1)
    ids = write._codec.tokenizer("ask. now", add_special_tokens=False).input_ids
    stop = next(place for place, i in enumerate(ids) if i in write._stop_token.ids)  # type: ignore[union-attr]
    row = RolloutRow(0, 0, [5], ids, torch.zeros(len(ids)), text="ask. now", finish="length")
    cut = write._cut(row, prompts(world)[0])
    assert (cut.text, cut.finish, cut.is_finished) == ("ask.", "stop", True)
    assert cut.token_ids == ids[: stop + 1] and len(cut.old_logprobs) == stop + 1
    whole = replace(row, token_ids=ids[:stop], old_logprobs=torch.zeros(stop), text="ask")
    assert write._cut(whole, prompts(world)[0]) is whole


class Fitting:
    """Prompts of three letters or more do not fit, those of two are cut."""

    codec, room = ChatCodec(byte_level_tokenizer(), "raw"), 1

    def fit(self, prompt: CandidateSet) -> Fit:
        length = len(prompt.query)
        return Fit(length, "too long" if length > 2 else "", is_cut=length > 1)


def test_prompts_that_do_not_fit_are_counted_and_candidates_forgotten(
    world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    candidates = prompts(world)[0].candidates or (replace_candidate(),)
    given = [CandidateSet(q, q, None, candidates) for q in ("a", "bb", "ccc", "dddd", "eee", "f")]
    fitting: Any = Fitting()
    with caplog.at_level("INFO"):
        kept, cut = fitting_prompts(given, fitting, "file")
    assert [prompt.query for prompt in kept] == ["a", "bb", "f"] and cut == 1
    assert all(prompt.candidates == () for prompt in kept)
    left_out, shortened = [record.getMessage() for record in caplog.records][:2]
    assert left_out == "file: 3 of 6 prompts left out: too long (first: prompt ccc)"
    assert shortened.startswith("file: 1 of 6 prompts are longer than 1 tokens")
    assert "prompt bb" in shortened
    with pytest.raises(UserError, match="file: no prompt is left of 1 "):
        fitting_prompts(given[2:3], fitting, "file")


def replace_candidate() -> Any:
    from rrhf.records import Candidate

    return Candidate("an answer", "human:chosen", 1.0)


class Texts:
    """A tokenizer with full stops of every kind."""

    texts = (".", " .", ". ", "..", "x", "")
    all_special_ids = (5,)

    def get_vocab(self) -> dict[str, int]:
        return {f"token {place}": place for place in range(len(self.texts))}

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        return [self.texts[row[0]] for row in rows]


def test_a_stop_token_may_have_blanks_around_it() -> None:
    assert StopToken(Texts(), ".").ids == StopToken(Texts(), " .").ids == {0, 1, 2}


@pytest.mark.parametrize("is_training", [True, False])
def test_a_rollout_is_made_in_eval_mode_and_leaves_the_mode_as_it_was(
    world: Path, monkeypatch: pytest.MonkeyPatch, is_training: bool
) -> None:
    made = writer(world, **SCORER)
    made._root.train(is_training)
    modes: list[bool] = []
    for name in ("_sample", "_read"):
        plain = getattr(made, name)

        def noted(*words: Any, plain: Any = plain) -> Any:
            modes.append(any(module.training for module in made._root.modules()))
            return plain(*words)

        monkeypatch.setattr(made, name, noted)
    made.write(prompts(world), number=0)
    assert modes == [False, False]
    assert all(module.training is is_training for module in made._root.modules())


def other_rank(rollout: Rollout) -> Rollout:
    return Rollout(
        [row for row in rollout.rows if row.prompt % 2], Counter(sampled=3, looped=1), {}
    )


def test_the_rows_of_all_ranks_are_in_the_order_of_the_prompts(world: Path) -> None:
    alone = writer(world, **SCORER).write(prompts(world), number=0)
    made = writer(world, **SCORER)
    parallel: Any = made._parallel
    parallel.rank, parallel.world_size = 0, 2
    parallel.max = lambda value: value
    parallel.gather = lambda parts: [*parts, other_rank(alone)]
    rollout = made.write(prompts(world), number=0)
    assert [row.prompt for row in rollout.rows] == [0, 1, 2, 3, 4, 5]
    assert answers(rollout) == answers(alone)
    assert rollout.counts["sampled"] == 6
    assert rollout.counts["looped"] == alone.counts["looped"] + 1


def test_a_signal_to_another_rank_drops_the_rollout_here_too(world: Path) -> None:
    made = writer(world, **SCORER)
    parallel: Any = made._parallel
    parallel.max = lambda value: max(value, 75)
    with pytest.raises(StoppedBySignal, match="rollout 3 was dropped"):
        made.write(prompts(world), number=3)


class Spread(Parallel):
    """Weights in pieces, though all of them are here."""

    weights_are_whole = False  # type: ignore[assignment]


@torch.no_grad()
def shift(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(5)
    for weight in policy.parameters():
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator))


def test_a_whole_copy_samples_with_the_present_weights(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = writer(world, **SCORER)
    monkeypatch.setattr("ppo_cases.Parallel", Spread)
    made = writer(world, **SCORER)
    made._root.train()
    assert made._copy is not None and made._policy is made._copy.policy
    start = answers(made.write(prompts(world), number=0))
    assert start == answers(whole.write(prompts(world), number=0))
    for root in (made._root, whole._root):
        shift(root.policy)
    moved = answers(made.write(prompts(world), number=0))
    assert moved == answers(whole.write(prompts(world), number=0)) != start


def test_a_whole_copy_has_no_dropout(world: Path) -> None:
    live = writer(world)._root.policy.train()
    copy = WholeCopy(live, Parallel()).policy
    assert not any(module.training for module in copy.modules())
    assert live.training and isinstance(copy, Policy)


def test_the_writers_own_root_is_live(world: Path) -> None:
    made: RolloutWriter = writer(world, **SCORER)
    assert made._policy is made._root.policy
