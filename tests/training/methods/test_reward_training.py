"""Reward training: losses from a real model's own scores, what may not change them, whole runs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Zygote
from reward_cases import conversation, language_model_folder
from safetensors.torch import load_file
from torch import Tensor
from trainer_cases import metrics_of, ranked_rows, same_weights, write_lines
from training_job import unfinish
from transformers import AutoModelForSequenceClassification, LlamaConfig

from rrhf.algorithms.normalizers import RunningMeanStd, build_normalizer
from rrhf.cli.flags import parse_config
from rrhf.data.candidate_files import write_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.data.formats import SourceCounts
from rrhf.data.mixing import load_sets
from rrhf.data.views import split_by_first_turn
from rrhf.errors import AlreadyFinished, UserError
from rrhf.models.loading import load_tokenizer
from rrhf.models.reward_model import RewardModel, ScoreOptions, load_reward_model, score_normalizer
from rrhf.records import Candidate, CandidateSet
from rrhf.scoring.reward_model import RewardModelScorer
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.streams import StepCut
from rrhf.training.methods import reward
from rrhf.training.methods.fitting import RowFitter
from rrhf.training.methods.reward import RewardConfig, RewardObjective
from rrhf.training.methods.reward_examples import PreferenceEncoder, figures, held_out_metrics
from rrhf.training.methods.score_watch import ScoreWatch

PAD, EOS = 2, 1
LOSS_TYPES = ("sequence-wise", "token-wise", "per_sample", "average", "last_token")


def settings(**changes: Any) -> RewardConfig:
    return RewardConfig("unused", "unused", data_path="unused", **changes)


def tiny_classifier() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=1,
        pad_token_id=PAD,
        initializer_range=0.2,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def examples() -> list[EncodedSet]:
    """Ragged groups, with ties, a single response, and responses that share their beginning."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 60, (length,), generator=generator).tolist()

    common = ids(3)
    return [
        EncodedSet(ids(7), [[*ids(4), EOS], [*ids(8), EOS], [*ids(1), EOS]], [0.3, -1.0, 2.0]),
        EncodedSet(ids(3), [[*ids(4), EOS]], [1.0]),
        EncodedSet(ids(5), [[*common, EOS], [*common, *ids(2), EOS]], [0.0, 1.0]),
        EncodedSet(ids(9), [[EOS], [*ids(5), EOS], [*ids(5), EOS], ids(3)], [1.0, 1.0, -0.5, 1.0]),
        EncodedSet(ids(2), [[*ids(7), EOS], [*ids(7), EOS]], [0.0, 0.0]),
    ]


def loss_and_gradient(
    config: RewardConfig, batches: Iterable[TokenBatch]
) -> tuple[float, list[Tensor]]:
    """What the loop makes of micro-batches, written out."""
    model, objective = (
        RewardModel(tiny_classifier(), ScoreOptions(config.reads_tokens)),
        RewardObjective(config),
    )
    batches = list(batches)
    denominators: dict[str, float] = {}
    for batch in batches:
        for name, value in objective.denominators(batch).items():
            denominators[name] = denominators.get(name, 0.0) + float(value)
    loss = torch.zeros(())
    for batch in batches:
        for name, term in objective(model(batch), batch).items():
            if denominators[name]:
                loss = loss + term.weight * term.total / denominators[name]
    loss.backward()
    return float(loss.detach()), [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(one: tuple[float, list[Tensor]], two: tuple[float, list[Tensor]]) -> None:
    """float32 sums in another order differ by some 1e-7 of their size."""
    assert one[0] == pytest.approx(two[0], rel=1e-5)
    a, b = (torch.cat([g.double().flatten() for g in gradients]) for gradients in (one[1], two[1]))
    assert float((a - b).norm() / b.norm()) < 1e-5


# The slow truth: unpadded rows through transformers' own trunk, loops over pairs and positions.


def slow_scores(model: Any, prompt: list[int], response: list[int], width: int) -> list[Tensor]:
    """Scores at the response's positions; past its end, of pad ids that nothing attends to."""
    ids = [*prompt, *response]
    scores = list(model.score(model.model(torch.tensor([ids])).last_hidden_state)[0, :, 0])
    if width > len(response):
        # As the batch has them: all on the last position, attending to what is real alone.
        padded = torch.tensor([ids + [PAD] * (width - len(response))])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(response))])
        places = (mask.cumsum(1) - 1).clamp_min(0)
        hidden = model.model(padded, attention_mask=mask, position_ids=places).last_hidden_state
        scores = list(model.score(hidden)[0, :, 0])
    return scores[len(prompt) :]


def slow_loss(
    loss_type: str,
    example: EncodedSet,
    margin: float,
    factor: float,
) -> tuple[float, int, float, int]:
    """Sum of pair losses, number of pairs, sum of squares, number of squares of one prompt."""
    model = tiny_classifier()
    assert example.scores is not None
    width = max(len(ids) for ids in example.response_ids)
    scores = [
        slow_scores(model, list(example.prompt_ids), list(ids), width)
        for ids in example.response_ids
    ]
    total, pairs = 0.0, 0
    for i, worse in enumerate(example.response_ids):
        for j, better in enumerate(example.response_ids):
            if not example.scores[i] < example.scores[j]:
                continue
            pairs += 1
            wanted = margin + factor * (example.scores[j] - example.scores[i])
            if loss_type in ("sequence-wise", "last_token"):
                lead = scores[j][len(better) - 1] - scores[i][len(worse) - 1] - wanted
                total += math.log1p(math.exp(-float(lead.detach())))
                continue
            longer = max(len(worse), len(better))
            shorter = min(len(worse), len(better))
            start = next((t for t in range(shorter) if worse[t] != better[t]), shorter)
            if loss_type == "average":
                means = [
                    sum(float(x) for x in row[min(start, n - 1) : n]) / (n - min(start, n - 1))
                    for row, n in ((scores[i], len(worse)), (scores[j], len(better)))
                ]
                total += math.log1p(math.exp(-(means[1] - means[0] - wanted)))
            else:
                leads = [float(scores[j][t] - scores[i][t]) for t in range(start, longer)]
                each = [math.log1p(math.exp(-(lead - wanted))) for lead in leads]
                total += sum(each) / len(each)
    reads_tokens = loss_type in ("token-wise", "per_sample", "average")
    squares = [
        float(x) ** 2
        for row, ids in zip(scores, example.response_ids, strict=True)
        for x in (row[: len(ids)] if reads_tokens else row[len(ids) - 1 : len(ids)])
    ]
    return total, pairs, sum(squares), len(squares)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("reduction", ["prompt", "pair"])
def test_the_loss_equals_a_slow_one(loss_type: str, reduction: str) -> None:
    margin, factor, weight = 0.3, 0.2, 0.05
    config = settings(
        loss_type=loss_type,
        pair_reduction=reduction,
        margin=margin,
        margin_per_score=factor,
        regularization=weight,
    )
    rows = [slow_loss(loss_type, e, margin, factor) for e in examples()]
    if reduction == "pair":
        expected = sum(r[0] for r in rows) / sum(r[1] for r in rows)
    else:
        means = [r[0] / r[1] for r in rows if r[1]]
        expected = sum(means) / len(means)
    expected += weight * sum(r[2] for r in rows) / sum(r[3] for r in rows)
    loss, _ = loss_and_gradient(config, [collate(examples(), PAD)])
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_wrong_last_token_would_be_seen() -> None:
    """Negative control: ends one token early change the loss by far more than the tolerance."""
    early = [
        EncodedSet(e.prompt_ids, [ids[:-1] or ids for ids in e.response_ids], e.scores)
        for e in examples()
    ]
    right, _ = loss_and_gradient(settings(), [collate(examples(), PAD)])
    wrong, _ = loss_and_gradient(settings(), [collate(early, PAD)])
    assert abs(right - wrong) > 1e-2


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_batches_order_and_accumulation_change_nothing(loss_type: str) -> None:
    config = settings(loss_type=loss_type, regularization=0.1)
    whole = loss_and_gradient(config, [collate(examples(), PAD)])
    assert_same(loss_and_gradient(config, [collate(examples()[::-1], PAD)]), whole)
    assert_same(loss_and_gradient(config, [collate([e], PAD) for e in examples()]), whole)
    split = [collate(examples()[:2], PAD), collate(examples()[2:], PAD)]
    assert_same(loss_and_gradient(config, split), whole)
    turned = [
        EncodedSet(e.prompt_ids, e.response_ids[::-1], (e.scores or [])[::-1]) for e in examples()
    ]
    assert_same(loss_and_gradient(config, [collate(turned, PAD)]), whole)
    filler = EncodedSet([7, 8], [[9, EOS], [10, EOS]], [1.0, 2.0], weight=0.0)
    assert_same(loss_and_gradient(config, [collate([*examples(), filler], PAD)]), whole)


@pytest.mark.parametrize("loss_type", ["sequence-wise", "last_token", "average"])
def test_the_pad_id_changes_nothing_even_where_it_is_eos(loss_type: str) -> None:
    """token-wise and per_sample read padding by definition, so they are left out."""
    config = settings(loss_type=loss_type)
    whole = loss_and_gradient(config, [collate(examples(), PAD)])
    assert_same(loss_and_gradient(config, [collate(examples(), EOS)]), whole)


def test_only_the_order_of_preferences_counts_without_a_margin_by_score() -> None:
    stretched = [
        EncodedSet(e.prompt_ids, e.response_ids, [5 * math.tanh(s) - 1 for s in e.scores or []])
        for e in examples()
    ]
    whole = loss_and_gradient(settings(), [collate(examples(), PAD)])
    assert_same(loss_and_gradient(settings(), [collate(stretched, PAD)]), whole)
    config = settings(margin_per_score=0.5)
    assert loss_and_gradient(config, [collate(stretched, PAD)])[0] != pytest.approx(
        loss_and_gradient(config, [collate(examples(), PAD)])[0], rel=1e-3
    )


def test_metrics_are_over_real_prompts_and_ordered_pairs() -> None:
    model, config = RewardModel(tiny_classifier()), settings()
    batch = collate(examples(), PAD)
    with torch.no_grad():
        scores = model(batch)
        term = RewardObjective(config)(scores, batch)["reward"]
    rows, correct, margin, pairs = iter(scores.tolist()), 0, 0.0, 0
    for e in examples():
        mine = [next(rows) for _ in e.response_ids]
        for i, a in enumerate(e.scores or []):
            for j, b in enumerate(e.scores or []):
                if a < b:
                    pairs += 1
                    correct += mine[j] > mine[i]
                    margin += mine[j] - mine[i]
    metrics = {name: float(total / count) for name, (total, count) in term.metrics.items()}
    assert metrics["accuracy"] == pytest.approx(correct / pairs)
    assert metrics["score_margin"] == pytest.approx(margin / pairs, rel=1e-5)
    assert metrics["score_mean"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert metrics["score_mean_square"] == pytest.approx(float(scores.square().mean()), rel=1e-5)


# The normaliser.


def test_the_watch_shows_each_step_once_whatever_its_micro_batches() -> None:
    scores = torch.randn(12, generator=torch.Generator().manual_seed(0))
    parallel, states = Parallel(), []
    for sizes in ([12], [1, 11], [4, 4, 4]):
        watch = ScoreWatch(build_normalizer("ExponentialMovingAverage", 0.5), parallel)
        for step in (scores, scores * 2 + 1):
            for piece in step.split(sizes):
                watch.see(piece)
            watch.after_step(1, {})
        assert watch.normalizer is not None
        states.append(watch.normalizer.state_dict())
    for state in states[1:]:
        for name, value in states[0].items():
            assert state[name] == pytest.approx(value)


def test_one_sample_does_not_make_the_deviation_undefined() -> None:
    for name in ("RunningMeanStd", "ExponentialMovingAverage"):
        watch = ScoreWatch(build_normalizer(name), Parallel())
        watch.see(torch.tensor([3.0]))
        watch.after_step(1, {})
        assert watch.normalizer is not None
        assert (watch.normalizer.mean, watch.normalizer.std) == (3.0, 1.0)


def test_filler_prompts_and_evaluation_are_not_watched() -> None:
    watch = ScoreWatch(RunningMeanStd(), Parallel())
    objective, model = RewardObjective(settings(), watch), RewardModel(tiny_classifier())
    filler = EncodedSet([7], [[8, EOS]], [0.0], weight=0.0)
    batch = collate([*examples(), filler], PAD)
    with torch.no_grad():
        objective(model(batch), batch)
    watch.after_step(1, {})
    assert watch.normalizer is not None and watch.normalizer.count == 0
    objective(model(batch), batch)
    watch.after_step(1, {})
    assert watch.normalizer.count == batch.num_rows - 1


def test_normalised_scores_in_the_loss_are_those_of_the_steps_before() -> None:
    normalizer = RunningMeanStd()
    normalizer.update(torch.tensor([0.0, 4.0]))  # mean 2, deviation 2
    config = settings(normalize_score_during_training=True)
    batch = collate(examples(), PAD)
    with torch.no_grad():
        scores = RewardModel(tiny_classifier())(batch)
        watch = ScoreWatch(normalizer, Parallel())
        shown = RewardObjective(config, watch)(scores, batch)["reward"].total
        halved = RewardObjective(settings())((scores - 2) / 2, batch)["reward"].total
        raw = RewardObjective(settings())(scores, batch)["reward"].total
    assert float(shown) == pytest.approx(float(halved), rel=1e-5)
    assert float(shown) != pytest.approx(float(raw), rel=1e-3)


# Data.


def encoder(tmp_path: Path, **changes: Any) -> PreferenceEncoder:
    folder = language_model_folder(tmp_path / "lm")
    values = {"model_max_length": 30, "long_responses": "drop", **changes}
    return PreferenceEncoder(RowFitter(ChatCodec(load_tokenizer(folder)), **values))


def group(*texts_and_scores: tuple[str, float]) -> CandidateSet:
    candidates = tuple(Candidate(text, score=score) for text, score in texts_and_scores)
    return CandidateSet("id", "Q:", None, candidates)


def test_a_pair_goes_where_one_of_its_responses_does_not_fit(tmp_path: Path) -> None:
    encode = encoder(tmp_path)
    assert encode(group(("yes", 1.0), ("no " * 50, 0.0))) is None
    assert encode(group(("yes", 1.0), ("no", 1.0))) is None
    assert encode.counts["responses_dropped"] == 1
    assert encode.counts["prompts_without_ordered_pair"] == 2
    found = encode(group(("yes", 1.0), ("no " * 50, 0.0), ("no", 0.5), ("", 0.2)))
    assert found is not None
    assert found.scores == [1.0, 0.5, 0.2]
    assert len(found.response_ids[2]) == 1  # its end alone


def test_figures_of_hand_made_scores() -> None:
    """Two pairs right of three, margins 1, -2 and 3; the tie forms none."""
    scores = torch.tensor([2.0, 1.0, 0.0, 2.0, 3.0, 5.0, 2.0], dtype=torch.float64)
    found = figures(scores, [[1, 0], [1, 0], [0.5], [1, 0]])
    assert (found["accuracy"], found["pairs"], found["prompts"]) == (2 / 3, 3.0, 4.0)
    assert found["score_margin"] == pytest.approx(2 / 3)
    assert found["score_mean"] == pytest.approx(15 / 7)
    assert found["score_std"] == pytest.approx(float(scores.std(correction=0)))
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]


def test_a_part_of_data_is_held_out_from_like_the_whole(tmp_path: Path) -> None:
    """A file that was cut off with the same seed is not cut at the same places again."""
    data = str(write_lines(tmp_path / "ranked.jsonl", ranked_rows(400)))
    parts = split_by_first_turn(load_sets(data), {"one": 0.5, "other": 0.5}, seed=7)
    for name, part in parts.items():
        write_candidate_sets(tmp_path / f"{name}.jsonl", part)
        path = str(tmp_path / f"{name}.jsonl")
        given = RewardConfig("unused", "unused", data_path=path, validation_fraction=0.2, seed=7)
        train, held_out = reward._load(given, SourceCounts(), SourceCounts())
        # A share of .2 of 200 has a deviation of .028.
        assert len(held_out) / len(part) == pytest.approx(0.2, abs=0.1)
        assert len(train) + len(held_out) == len(part)


def test_held_out_figures_do_not_depend_on_batches() -> None:
    found = []
    for size in (1, 2, 5):
        for loss_type in ("sequence-wise", "average"):
            config = settings(loss_type=loss_type, pair_reduction="pair")
            model = RewardModel(tiny_classifier(), ScoreOptions(config.reads_tokens))
            objective = RewardObjective(config)
            cut = StepCut(PAD, size)
            found.append(held_out_metrics(model, objective, examples(), cut, Parallel()))
    for one, other in ((0, 2), (0, 4), (1, 3), (1, 5)):
        assert found[one] == pytest.approx(found[other], rel=1e-5, abs=1e-5)
    # Both read the score of a response at the same token.
    assert found[0]["score_mean"] == pytest.approx(found[1]["score_mean"], abs=1e-5)


# Whole runs.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(language_model_folder(tmp_path_factory.mktemp("model") / "lm"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Preferences with a rule: the reply that offers help is chosen."""
    generator = random.Random(0)
    nouns = ["plants", "friend", "fox", "dog", "help"]
    rows = []
    for i in range(120):
        prompt = f"\n\nHuman: how to {generator.choice(nouns)} {i}\n\nAssistant:"
        good, bad = (f"{word} {generator.choice(nouns)}" for word in ("ask", "never"))
        rows.append({"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"})
    return str(write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows))


def run(model: str, data: str, output: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model_max_length": 120,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "validation_fraction": 0.25,
        "num_train_epochs": 2,
        **changes,
    }
    reward.train(RewardConfig(model, str(output), data_path=data, **values))
    manifest: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return manifest


def test_a_rule_is_learnt_from_pairs_and_the_folder_scores_by_it(
    model: str, pairs: str, tmp_path: Path
) -> None:
    manifest = run(model, pairs, tmp_path / "run", chat_format="hh")
    held_out = manifest["evaluation"]
    assert held_out["accuracy"] > 0.9 and held_out["accuracy_low"] > 0.7
    assert held_out["pairs"] == manifest["held_out_data"]["examples"]["prompts_used"]
    assert manifest["data"]["examples"]["prompts_used"] + held_out["pairs"] == 120
    assert held_out["score_margin"] > 0 and held_out["score_std"] > 0

    folder = tmp_path / "run" / "reward_model"
    scorer = RewardModelScorer(folder)
    assert scorer.normalized and scorer.codec.chat_format == "hh"
    assert score_normalizer(load_reward_model(folder).config) is not None
    assert manifest["normalizer"]["count"] == 2 * 2 * manifest["data"]["examples"]["prompts_used"]
    query = "\n\nHuman: how to fox\n\nAssistant:"
    candidates = (Candidate(" ask dog"), Candidate(" never dog"))
    [[good, bad]] = scorer.score([CandidateSet("x", query, None, candidates)])
    assert good is not None and bad is not None and good > bad
    assert [row for row in metrics_of(tmp_path / "run") if "eval_accuracy" in row]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "token-wise"},
        {"loss_type": "average", "regularization": 0.01},
        {"normalize_score_during_training": True},
        {"gradient_checkpointing": True, "bf16": True},
    ],
    ids=["token-wise", "average", "normalised", "bf16"],
)
def test_a_rule_is_learnt_in_other_ways(
    changes: dict[str, Any], model: str, pairs: str, tmp_path: Path
) -> None:
    assert run(model, pairs, tmp_path / "run", **changes)["evaluation"]["accuracy"] > 0.9


def test_adapters_train_the_head_in_full_and_merge_under_plain_names(
    model: str, pairs: str, tmp_path: Path
) -> None:
    manifest = run(model, pairs, tmp_path / "run", use_lora=True, learning_rate=1e-2)
    assert manifest["evaluation"]["accuracy"] > 0.9
    folder = tmp_path / "run" / "reward_model"
    weights = load_file(folder / "model.safetensors")
    assert "score.weight" in weights and not any("lora" in n or "base" in n for n in weights)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    candidates = (Candidate(" ask dog"), Candidate(" never dog"))
    asked = CandidateSet("x", "\n\nHuman: how to fox\n\nAssistant:", None, candidates)
    [[good, bad]] = RewardModelScorer(folder).score([asked])
    assert good is not None and bad is not None and good > bad


def test_ranked_groups_and_validation_data_of_their_own(
    model: str, pairs: str, tmp_path: Path
) -> None:
    ranked = str(write_lines(tmp_path / "ranked.jsonl", ranked_rows(15)))
    manifest = run(
        model, ranked, tmp_path / "run", validation_datasets=pairs, normalizer_type="none"
    )
    assert manifest["validation"] == pairs
    assert manifest["evaluation"]["pairs"] == 120
    assert manifest["data"]["examples"]["prompts"] == 15
    assert manifest["normalizer"] is None
    assert not RewardModelScorer(tmp_path / "run" / "reward_model").normalized


def test_without_validation_nothing_is_evaluated(model: str, pairs: str, tmp_path: Path) -> None:
    manifest = run(model, pairs, tmp_path / "run", validation_fraction=0.0, max_steps=2)
    assert manifest["evaluation"] == {}
    assert manifest["data"]["examples"]["prompts"] == 120


def test_training_goes_on_from_a_reward_model(model: str, pairs: str, tmp_path: Path) -> None:
    run(model, pairs, tmp_path / "one")
    again = run(str(tmp_path / "one" / "reward_model"), pairs, tmp_path / "two", max_steps=1)
    assert again["evaluation"]["accuracy"] > 0.9


def test_pad_equal_to_eos_or_absent_trains_and_scores_at_eos(pairs: str, tmp_path: Path) -> None:
    for name, pad in (("eos", "</s>"), ("none", None)):
        folder = str(language_model_folder(tmp_path / name, pad=pad))
        run_folder = tmp_path / f"run-{name}"
        assert run(folder, pairs, run_folder)["evaluation"]["accuracy"] > 0.9
        saved = load_reward_model(run_folder / "reward_model")
        assert saved.config.pad_token_id is None


JOB = "test_reward_training:job"


def job(model: str, data: str, output: str) -> None:
    """Starts, or goes on with, a training that has much to remember."""
    config = RewardConfig(
        model,
        output,
        data_path=data,
        model_max_length=120,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        num_train_epochs=2,
        validation_fraction=0.2,
        normalizer_type="ExponentialMovingAverage",
        normalize_score_during_training=True,
        eval_steps=3,
        save_steps=2,
        resume_from_checkpoint=(Path(output) / "settings.json").exists(),
    )
    with suppress(AlreadyFinished):
        reward.train(config)


def test_twenty_kills_change_no_bit(model: str, tmp_path: Path) -> None:
    data = str(write_lines(tmp_path / "ranked.jsonl", ranked_rows(24)))
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    with Zygote(JOB, {"model": model, "data": data, "output": str(straight)}) as zygote:
        whole = zygote.run()
        assert whole["exit"] == 0
    moments, kills = random.Random(5), 0
    with Zygote(JOB, {"model": model, "data": data, "output": str(killed)}) as zygote:
        while True:
            limit = moments.uniform(0.05, 0.9) * whole["seconds"] if kills < 20 else None
            answer = zygote.run(kill_after_seconds=limit)
            kills += bool(answer["signal"])
            if answer["signal"]:
                continue
            assert answer["exit"] == 0
            folders = killed / "reward_model", straight / "reward_model"
            assert same_weights(*folders)
            configs = [json.loads((f / "config.json").read_text()) for f in folders]
            assert configs[0]["rrhf_score_normalizer"] == configs[1]["rrhf_score_normalizer"]
            assert timeless(killed) == timeless(straight)
            if kills >= 20:
                return
            for path in sorted(killed.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()


def timeless(run_folder: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if name != "tokens_per_second"}
        for row in metrics_of(run_folder)
    ]


def test_two_processes_train_like_one(model: str, tmp_path: Path) -> None:
    """14 prompts, 6 a step: a rank falls short, in training and on the held-out part."""
    data = str(write_lines(tmp_path / "ranked.jsonl", ranked_rows(18)))
    shared(model, data, str(tmp_path / "one"), 2)
    settings = {"model": model, "data": data, "output": str(tmp_path / "two"), "accumulation": 1}
    with Zygote("test_reward_training:shared", settings) as zygote:
        assert zygote.run_ranks() == [0, 0]
    for mine, theirs in zip(timeless(tmp_path / "two"), timeless(tmp_path / "one"), strict=True):
        # Sums over two ranks round differently, and Adam makes a little more of it each step.
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    states = [
        json.loads((tmp_path / name / "manifest.json").read_text())["normalizer"]
        for name in ("two", "one")
    ]
    assert states[0].pop("type") == states[1].pop("type") == "RunningMeanStd"
    assert states[0] == pytest.approx(states[1], rel=1e-4)


def shared(model: str, data: str, output: str, accumulation: int) -> None:
    """The same global batch for one process with accumulation 2 and for two with 1."""
    reward.train(
        RewardConfig(
            model,
            output,
            data_path=data,
            model_max_length=120,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            num_train_epochs=2,
            validation_fraction=0.3,
            regularization=0.1,
            normalize_score_during_training=True,
            eval_steps=2,
        )
    )


def test_a_real_trunk_and_real_pairs(shared_data: Path, tmp_path: Path) -> None:
    """A SentencePiece-style tokenizer with BOS: loads, learns a step, scores, in its own window."""
    pairs = f"{shared_data / 'hh_harmless_base_test.jsonl.gz'}:40/-1"
    manifest = run(
        str(shared_data / "stories260K"),
        pairs,
        tmp_path / "run",
        chat_format="hh",
        max_steps=2,
        model_max_length=256,
    )
    used = manifest["data"]["examples"]["prompts_used"]
    assert used + manifest["held_out_data"]["examples"]["prompts_used"] <= 40
    assert manifest["evaluation"]["pairs"] > 0
    folder = tmp_path / "run" / "reward_model"
    s = conversation("how do I keep plants alive", "ask a friend", "")
    scores = RewardModelScorer(folder).score([s])[0]
    codec = ChatCodec(load_tokenizer(folder), "hh")
    prompt = codec.encode_prompt(s)
    assert prompt is not None and prompt.count(codec.bos_id) == 1
    classifier = load_reward_model(folder)
    normalizer = score_normalizer(classifier.config)
    assert normalizer is not None
    for candidate, score in zip(s.candidates, scores, strict=True):
        row = [*prompt, *codec.encode_response(s, candidate.response)]
        with torch.no_grad():
            raw = float(classifier(input_ids=torch.tensor([row])).logits[0, 0])
        right = (raw - normalizer.mean) / (normalizer.std + 1e-8)
        assert score == pytest.approx(right, abs=1e-4)


def test_going_on_with_another_normaliser_is_refused(
    model: str, pairs: str, tmp_path: Path
) -> None:
    run(model, pairs, tmp_path / "run", max_steps=2, save_steps=1)
    unfinish(tmp_path / "run")
    with pytest.raises(UserError, match="--normalizer_type"):
        run(
            model,
            pairs,
            tmp_path / "run",
            max_steps=3,
            normalizer_type="none",
            resume_from_checkpoint=True,
        )


# Flags.


def test_both_spellings_of_the_data_flags_are_taken() -> None:
    words = ["--model_name_or_path", "m", "--output_dir", "o"]
    for train, valid in (("train_file", "valid_file"), ("train_data", "valid_data")):
        config = parse_config(RewardConfig, [*words, f"--{train}", "a", f"--{valid}", "b"], "x")
        assert (config.data_path, config.validation_datasets) == ("a", "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_fraction": 1.0}, "--validation_fraction 1.0"),
        ({"normalizer_momentum": 1.0}, "--normalizer_momentum 1.0"),
        ({"regularization": -1.0}, "--regularization -1.0"),
        ({"normalize_score_during_training": True, "normalizer_type": "none"}, "needs a norm"),
        ({"max_response_tokens": 600}, "--max_response_tokens 600"),
    ],
)
def test_impossible_settings_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**changes)
