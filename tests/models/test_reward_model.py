"""The reward model's forward interface, its head, and the folder that it is saved as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reward_cases import (
    EOS,
    FAMILIES,
    PAD,
    classifier,
    conversation,
    encoded_sets,
    language_model_folder,
    reward_model_folder,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.models.reward_model import (
    RewardModel,
    ScoreOptions,
    init_reward_model,
    load_reward_model,
    score_normalizer,
    set_score_normalizer,
)

# float32 scores of order 1 through two layers: other paddings sum in another order.
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def batch_of(sets: list[EncodedSet], pad_id: int = PAD) -> TokenBatch:
    return collate(sets, pad_id)


@torch.no_grad()
def one_by_one(model: Any, sets: list[EncodedSet]) -> Tensor:
    """The oracle: the classifier's own forward on each row alone, without any padding.

    A pad id of None makes it read the last position.
    """
    pad, model.config.pad_token_id = model.config.pad_token_id, None
    scores = [
        model(input_ids=torch.tensor([[*s.prompt_ids, *ids]])).logits[0, 0]
        for s in sets
        for ids in s.response_ids
    ]
    model.config.pad_token_id = pad
    return torch.stack(scores)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_scores_equal_the_family_s_own_classifier_on_rows_without_padding(family: str) -> None:
    model = classifier(family)
    sets = encoded_sets(50, end_id=EOS)
    scores = RewardModel(model)(batch_of(sets))
    assert scores.dtype == torch.float32 and scores.shape == (9,)
    torch.testing.assert_close(scores, one_by_one(model, sets), **CLOSE)


@torch.no_grad()
def test_pad_equal_to_eos_is_read_at_eos_where_transformers_reads_one_token_early() -> None:
    model = classifier(pad_token_id=EOS)
    sets = [EncodedSet([7, 8], [[9, 10, EOS], [11, EOS]])]
    batch = batch_of(sets, pad_id=EOS)
    right = one_by_one(model, sets)
    torch.testing.assert_close(RewardModel(model)(batch), right, **CLOSE)

    ids, mask, _ = batch.full_rows()
    theirs = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    early = one_by_one(model, [EncodedSet([7, 8], [[9, 10], [11]])])
    torch.testing.assert_close(theirs, early, **CLOSE)
    assert (theirs - right).abs().min() > 1e-3


@torch.no_grad()
def test_a_wrong_last_token_would_be_seen() -> None:
    """Negative control: the neighbours' scores differ by far more than the tolerance."""
    model, sets = classifier(), encoded_sets(50, end_id=EOS)
    batch = batch_of(sets)
    scores, tokens = RewardModel(model)(batch), RewardModel(model).token_scores(batch)
    last = batch.prompt_ids.shape[1] + batch.response_lengths - 1
    rows = torch.arange(len(last))
    assert torch.equal(scores, tokens[rows, last])
    assert (scores - tokens[rows, last - 1]).abs().min() > 1e-3


@torch.no_grad()
def test_scores_do_not_depend_on_batch_mates_order_or_pad_id() -> None:
    model = RewardModel(classifier())
    sets = encoded_sets(50, end_id=EOS)
    together = model(batch_of(sets))
    alone = torch.cat([model(batch_of([s])) for s in sets])
    torch.testing.assert_close(together, alone, **CLOSE)

    torch.testing.assert_close(model(batch_of(sets, pad_id=EOS)), together, **CLOSE)

    counts = [len(s.response_ids) for s in sets]
    reversed_scores = model(batch_of(sets[::-1])).split(counts[::-1])
    torch.testing.assert_close(torch.cat(reversed_scores[::-1]), together, **CLOSE)

    # All padding on the right: the first id is the prompt, the rest the response.
    rows = [[*s.prompt_ids, *ids] for s in sets for ids in s.response_ids]
    right = model(batch_of([EncodedSet(row[:1], [row[1:]]) for row in rows]))
    torch.testing.assert_close(right, together, **CLOSE)


@torch.no_grad()
def test_per_token_gives_the_response_positions() -> None:
    model, batch = classifier(), batch_of(encoded_sets(50, end_id=EOS))
    tokens = RewardModel(model, ScoreOptions(per_token=True))(batch)
    assert tokens.shape == batch.response_ids.shape
    width = batch.prompt_ids.shape[1]
    assert torch.equal(tokens, RewardModel(model).token_scores(batch)[:, width:])


@torch.no_grad()
def test_first_end_id_reads_at_the_first_one_wherever_it_stands() -> None:
    model = classifier()
    in_response = EncodedSet([7], [[9, EOS, 10, EOS]])
    in_prompt = EncodedSet([7, EOS, 8], [[9, EOS]])
    nowhere = EncodedSet([7, 8], [[9, 10]])
    sets = [in_response, in_prompt, nowhere]
    expected = one_by_one(
        model,
        [EncodedSet([7], [[9, EOS]]), EncodedSet([7], [[EOS]]), EncodedSet([7, 8], [[9, 10]])],
    )
    scores = RewardModel(model, ScoreOptions(first_end_id=EOS))(batch_of(sets))
    torch.testing.assert_close(scores, expected, **CLOSE)
    # Padding of the same id is not taken for one, on the left as on the right.
    scores = RewardModel(model, ScoreOptions(first_end_id=EOS))(batch_of(sets, pad_id=EOS))
    torch.testing.assert_close(scores, expected, **CLOSE)


@torch.no_grad()
def test_the_head_stays_in_float32_under_bfloat16() -> None:
    model = RewardModel(classifier().to(torch.bfloat16))
    assert model.model.score.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(batch_of(encoded_sets(50)))
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


def test_a_new_head_depends_on_its_seed_alone(tmp_path: Path) -> None:
    base = language_model_folder(tmp_path / "lm")
    torch.manual_seed(1)
    first = init_reward_model(base, seed=5, pad_id=PAD)
    torch.manual_seed(2)
    again, other = init_reward_model(base, 5, PAD), init_reward_model(base, 6, PAD)
    assert torch.equal(first.score.weight, again.score.weight)
    assert not torch.equal(first.score.weight, other.score.weight)
    trunk = load_file(base / "model.safetensors")
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, trunk[f"model.{name}"])


def test_a_trained_head_is_kept_when_training_goes_on(tmp_path: Path) -> None:
    folder = reward_model_folder(tmp_path / "rm", seed=3)
    again = init_reward_model(folder, seed=9, pad_id=PAD)
    assert torch.equal(again.score.weight, load_file(folder / "model.safetensors")["score.weight"])


@torch.no_grad()
def test_the_folder_gives_the_same_score_in_transformers_own_pipeline(tmp_path: Path) -> None:
    folder = reward_model_folder(tmp_path / "rm", pad="<pad>", chat_format="hh")
    codec = ChatCodec(AutoTokenizer.from_pretrained(folder), "hh")
    s = conversation("how do I keep plants alive", "ask a friend", "")
    prompt, eos = codec.prompt_text(s), codec.tokenizer.eos_token
    texts = [f"{prompt} ask a friend{eos}", f"{prompt}{eos}"]
    classify = pipeline("text-classification", model=str(folder), device="cpu")
    theirs = [row["score"] for row in classify(texts, batch_size=2)]
    responses = [codec.encode_response(s, c.response) for c in s.candidates]
    batch = batch_of([EncodedSet(codec.encode_prompt(s) or [], responses)], codec.pad_id)
    ours = RewardModel(load_reward_model(folder))(batch)
    torch.testing.assert_close(torch.tensor(theirs), ours, **CLOSE)


@torch.no_grad()
def test_without_a_pad_of_its_own_transformers_refuses_batches_instead_of_misreading(
    tmp_path: Path,
) -> None:
    folder = reward_model_folder(tmp_path / "rm", pad="</s>")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.config.pad_token_id is None
    with pytest.raises(ValueError, match="batch sizes > 1"):
        model(input_ids=torch.tensor([[5, 6, EOS], [7, EOS, EOS]]))
    alone = model(input_ids=torch.tensor([[5, 6, EOS]])).logits[0, 0]
    ours = RewardModel(load_reward_model(folder))(batch_of([EncodedSet([5], [[6, EOS]])], EOS))
    torch.testing.assert_close(ours[0], alone, **CLOSE)


def test_the_normaliser_is_kept_in_the_config_and_not_applied(tmp_path: Path) -> None:
    normalizer = RunningMeanStd()
    normalizer.update(torch.tensor([1.0, 4.0, 10.0]))
    plain = load_reward_model(reward_model_folder(tmp_path / "a"))
    kept = load_reward_model(reward_model_folder(tmp_path / "b", normalizer=normalizer))
    assert score_normalizer(plain.config) is None
    found = score_normalizer(kept.config)
    assert found is not None and found.state_dict() == normalizer.state_dict()
    batch = batch_of(encoded_sets(300))
    with torch.no_grad():
        assert torch.equal(RewardModel(plain)(batch), RewardModel(kept)(batch))
    set_score_normalizer(kept.config, None)
    assert score_normalizer(kept.config) is None


@pytest.mark.parametrize("state", [{"type": "Median"}, {"type": "RunningMeanStd"}, 3])
def test_a_normaliser_that_is_none_is_a_user_s_mistake(tmp_path: Path, state: object) -> None:
    model = load_reward_model(reward_model_folder(tmp_path / "rm"))
    model.config.rrhf_score_normalizer = state
    with pytest.raises(UserError, match="rrhf_score_normalizer"):
        score_normalizer(model.config)


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    base = language_model_folder(tmp_path / "lm")
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*not a reward model.*rrhf train reward"):
        load_reward_model(base)


def test_a_missing_head_is_told(tmp_path: Path) -> None:
    folder = reward_model_folder(tmp_path / "rm")
    edit_weights(folder, remove="score.weight")
    with pytest.raises(UserError, match=r"reward model without a head: score\.weight"):
        load_reward_model(folder)
    with pytest.raises(UserError, match=r"reward model without a head"):
        init_reward_model(folder, 0, PAD)


def test_weights_that_are_missing_or_too_many_are_told(tmp_path: Path) -> None:
    folder = reward_model_folder(tmp_path / "rm")
    edit_weights(folder, remove="model.norm.weight")
    with pytest.raises(UserError, match=r"lacks 1 weights \(first: model\.norm\.weight\)"):
        load_reward_model(folder)
    folder = reward_model_folder(tmp_path / "other")
    edit_weights(folder, add="v_head.weight")
    with pytest.raises(UserError, match=r"in addition to the model's.*v_head\.weight"):
        load_reward_model(folder)


def test_several_labels_and_missing_folders_are_told(tmp_path: Path) -> None:
    folder = reward_model_folder(tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="classifier with 2 labels"):
        load_reward_model(folder)
    with pytest.raises(UserError, match="no such model folder"):
        load_reward_model(tmp_path / "nothing")


def edit_weights(folder: Path, remove: str | None = None, add: str | None = None) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    if remove:
        del weights[remove]
    if add:
        weights[add] = torch.zeros(1, 32)
    save_file(weights, file, metadata={"format": "pt"})
