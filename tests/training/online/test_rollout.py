"""What a rollout holds, and what it becomes: ids, log-probs, rewards in their places."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import build_world, settings, workbench
from rollout_cases import hand_made_rows, prompts, writer

from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.generation.engine import answers
from rrhf.generation.local.engine import LocalEngine
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.models.policy_with_value import ActorCritic, ValueHead, ValueModel
from rrhf.models.reward_model import load_reward_model
from rrhf.records import FinishReason
from rrhf.scoring.build import build_scorer
from rrhf.scoring.reward_model import RewardModelScorer
from rrhf.training.online.experience import RolloutRow, build_experience, pack, unpack
from rrhf.training.online.rollout import RolloutWriter


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


def test_the_sampled_ids_are_trained_on_with_their_log_probs(world: Path) -> None:
    rollout = writer(world, num_return_sequences=2).write(prompts(world), number=3)
    config = settings(world, "unused", num_return_sequences=2)
    codec = ChatCodec(load_tokenizer(world / "model"), "raw")
    engine = LocalEngine(load_causal_lm(world / "model"), codec)
    samples = answers(engine, prompts(world), config.sampling(3))
    assert len(rollout.rows) == 12 == rollout.counts["sampled"]
    for row in rollout.rows:
        assert row.token_ids == samples[row.prompt][row.sample].token_ids.tolist()
        batch = collate([EncodedSet(row.prompt_ids, [row.token_ids])], codec.pad_id)
        read = Policy(load_causal_lm(world / "model"))(batch).logprobs[0].detach()
        # float32, a handful of layers: the engine grows a past, the trainer reads whole rows.
        torch.testing.assert_close(row.old_logprobs, read, atol=1e-4, rtol=0)
        torch.testing.assert_close(row.reference_logprobs, read, atol=1e-4, rtol=0)
        assert row.values is not None and len(row.values) == len(row.token_ids)
        assert row.is_finished == (row.token_ids[-1] == codec.end_id)


def test_where_engine_and_trainer_differ_the_trainer_is_believed(world: Path) -> None:
    """Here by a temperature that the trainer's forward has and the sampling lacks."""
    rollout = writer(world, temperature=1.5).write(prompts(world), number=0)
    row = rollout.rows[0]
    batch = collate([EncodedSet(row.prompt_ids, [row.token_ids])], 2)
    read = Policy(load_causal_lm(world / "model"), LogprobOptions(1.5))(batch).logprobs[0].detach()
    torch.testing.assert_close(row.old_logprobs, read, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shares_trunk", [False, True])
def test_no_policy_is_read_where_sampling_left_its_log_probs(
    world: Path, shares_trunk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One response of a rollout is, to see whether they agree; of the others only values."""
    config = settings(world, "unused", num_return_sequences=2)
    codec = ChatCodec(load_tokenizer(world / "model"), "raw")
    policy = build_policy(load_causal_lm(world / "model"), "auto")
    value = ValueHead(32) if shares_trunk else ValueModel(load_reward_model(world / "reward"))
    root = ActorCritic(policy, value)
    reference = Policy(load_causal_lm(world / "model"))
    scorer = build_scorer(config.reward_model_name_or_path)
    write = RolloutWriter(root, reference, scorer, config, workbench(config, codec)).write
    rows: list[tuple[str, int]] = []

    def count(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def counted(self: Any, batch: TokenBatch) -> Any:
            rows.append((name, batch.num_rows))
            return plain(self, batch)

        monkeypatch.setattr(owner, name, counted)

    for name in ("forward", "with_hidden", "hidden"):
        count(FastPolicy, name)
    written = write(prompts(world), number=0).rows
    assert len(written) == 12
    assert rows == (
        [("with_hidden", 1), *[("hidden", 8), ("hidden", 4)]] if shares_trunk else [("forward", 1)]
    )
    for row in written:
        assert row.values is not None and row.old_logprobs.abs().sum() > 0


def test_a_prompt_that_occurs_twice_is_answered_twice(world: Path) -> None:
    one = prompts(world)[0]
    rows = writer(world).write([one, one], number=0).rows
    assert rows[0].token_ids != rows[1].token_ids


def test_responses_without_a_score_are_left_out_up_to_a_limit(world: Path) -> None:
    scorer: dict[str, Any] = {"reward_model_name_or_path": "function:ppo_cases:some_none"}
    rollout = writer(world, **scorer, max_unscored_fraction=0.5).write(prompts(world), number=0)
    assert (len(rollout.rows), rollout.counts["unscored"]) == (4, 2)
    with pytest.raises(UserError, match="2 of 6 responses could not be scored"):
        writer(world, **scorer).write(prompts(world), number=0)


def test_responses_beyond_the_scorers_window_are_left_out_and_no_failure(world: Path) -> None:
    write = writer(world, num_return_sequences=2)
    scorer = write._scorer
    assert isinstance(scorer, RewardModelScorer)
    lengths = []
    for row in write.write(prompts(world), number=0).rows:
        end: FinishReason = "stop" if row.is_finished else "length"
        lengths.append(len(scorer.codec.encode_response(prompts(world)[0], row.text, end)))
    assert len(set(lengths)) > 1, lengths
    scorer.window = max(lengths)  # which leaves the longest no room for a prompt
    rollout = write.write(prompts(world), number=0)
    too_long = lengths.count(max(lengths))
    assert len(rollout.rows) == len(lengths) - too_long
    assert rollout.counts["unscored"] == rollout.counts["too_long_to_score"] == too_long
    scorer.window = 1
    with pytest.raises(UserError, match="none of the 12 responses of a rollout fits its window"):
        write.write(prompts(world), number=0)


def advantages(rows: list[RolloutRow], world: Path, **changes: Any) -> list[list[float]]:
    config = settings(world, "unused", normalize_advantage=False, **changes)
    experience = build_experience(rows, config, kl_coefficient=0.1)
    return [stored.advantages.tolist() for s in experience.sets for stored in s.experience or ()]


def test_the_score_stands_on_the_last_token_of_every_ragged_row(world: Path) -> None:
    """With gamma 0 and no critic each token is worth its own reward alone."""
    found = advantages(hand_made_rows(), world, method="reinforce_pp", gamma=0.0)
    assert found == [[1.0], [0.0, 0.0, 0.0, 2.0], [0.0, 3.0], [0.0, 0.0, 4.0]]


def test_scores_are_clipped_then_penalised(world: Path) -> None:
    found = advantages(
        hand_made_rows(),
        world,
        method="reinforce_pp",
        gamma=0.0,
        clip_range_score=1.5,
        missing_eos_penalty=3.0,
    )
    assert [row[-1] for row in found] == [1.0, 1.5 - 3.0, 1.5, 1.5]


def test_the_kl_is_taken_off_token_by_token(world: Path) -> None:
    rows = hand_made_rows()
    rows[3] = replace(rows[3], reference_logprobs=rows[3].old_logprobs - 0.5)
    found = advantages(rows, world, method="reinforce_pp", gamma=0.0)
    assert found[3] == pytest.approx([-0.05, -0.05, 4.0 - 0.05], abs=1e-6)
    in_loss = advantages(rows, world, method="reinforce_pp", gamma=0.0, kl_in="loss")
    assert in_loss[3] == [0.0, 0.0, 4.0]


def test_the_methods_compare_what_they_should(world: Path) -> None:
    """Two responses a prompt, scores (1, 2) and (3, 4): differences of 1, deviation 1/sqrt(2)."""
    rows = hand_made_rows()

    def first_of(method: str, **changes: Any) -> list[float]:
        found = advantages(rows, world, method=method, num_return_sequences=2, **changes)
        assert all(len(set(row)) == 1 for row in found)  # a response's tokens share it
        return [row[0] for row in found]

    assert first_of("rloo") == [-1.0, 1.0, -1.0, 1.0]
    assert first_of("dr_grpo") == [-0.5, 0.5, -0.5, 0.5]
    half = 0.5 * 2**0.5
    assert first_of("grpo") == pytest.approx([-half, half, -half, half], abs=1e-5)
    assert first_of("reinforce_pp") == [1.0, 2.0, 3.0, 4.0]
    # Values of zero and lambda 1: what is still to come.
    assert first_of("ppo", gae_lambda=1.0) == [1.0, 2.0, 3.0, 4.0]


def test_online_ranking_sees_groups_with_rewards(world: Path) -> None:
    rows = hand_made_rows()
    rows[3] = replace(rows[3], reference_logprobs=rows[3].old_logprobs - 0.5)
    config = settings(world, "unused", method="rrhf", num_return_sequences=2)
    sets = build_experience(rows, config, kl_coefficient=0.1).sets
    assert [len(s.response_ids) for s in sets] == [2, 2]
    assert sets[1].scores == pytest.approx([3.0, 4.0 - 0.15], abs=1e-6)


def test_the_running_normaliser_survives_a_first_batch_of_one(world: Path) -> None:
    normalizer = RunningMeanStd()
    config = settings(world, "unused", method="reinforce_pp", normalize_reward=True)
    for rows in (hand_made_rows()[:1], hand_made_rows()):
        experience = build_experience(rows, config, 0.1, normalizer)
        for s in experience.sets:
            assert s.experience and s.experience[0].advantages.isfinite().all()
    assert normalizer.count == 5
    assert normalizer.mean == pytest.approx((1 + 1 + 2 + 3 + 4) / 5)


@pytest.mark.parametrize("method", ["ppo", "rrhf"])
def test_an_experience_survives_a_checkpoint_exactly(world: Path, method: str) -> None:
    config = settings(world, "unused", method=method, num_return_sequences=2, kl_in="reward")
    sets = build_experience(hand_made_rows(), config, 0.1).sets
    again = unpack(pack(sets))
    one, two = collate(sets, 0), collate(again, 0)
    assert torch.equal(one.prompt_ids, two.prompt_ids)
    assert torch.equal(one.response_ids, two.response_ids)
    assert (one.experience is None) == (two.experience is None) == (method == "rrhf")
    if one.experience is not None and two.experience is not None:
        again_stored = two.experience.tensors()
        assert one.experience.tensors().keys() == again_stored.keys()
        assert all(torch.equal(v, again_stored[n]) for n, v in one.experience.tensors().items())
    assert [s.scores for s in sets] == [s.scores for s in again]
