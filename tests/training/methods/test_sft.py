"""Supervised fine-tuning: its loss, its rows, packing and whole runs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level_tokenizer, save_tiny, tiny_llama
from trainer_cases import metrics_of, ranked_rows, same_weights, write_lines
from transformers import AutoModelForCausalLM

from rrhf.data.chat_format import ChatCodec
from rrhf.data.collate import EncodedSet, collate
from rrhf.errors import UserError
from rrhf.models.forward.logprobs import LogprobOptions, Policy
from rrhf.models.forward.packed_rows import PackedPolicy
from rrhf.records import Candidate, CandidateSet
from rrhf.training.methods import sft
from rrhf.training.methods.fitting import RowFitter
from rrhf.training.methods.sft import SFTConfig, SFTEncoder, SFTObjective


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"query": row["query"], "responses": [row["responses"][0]]} for row in ranked_rows(14)]
    return write_lines(tmp_path_factory.mktemp("data") / "demonstrations.jsonl", rows)


def examples() -> list[EncodedSet]:
    generator = torch.Generator().manual_seed(2)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 300, (length,), generator=generator).tolist()

    return [EncodedSet(ids(p), [ids(r)]) for p, r in ((7, 4), (2, 9), (11, 1), (3, 6))]


def slow_losses(example: EncodedSet, label_smoothing: float) -> list[float]:
    """Per target token, from one unpadded row."""
    (response,) = example.response_ids
    ids = torch.tensor([[*example.prompt_ids, *response]])
    with torch.no_grad():
        logprobs = tiny_llama()(input_ids=ids).logits[0].double().log_softmax(-1)
    losses = []
    for t, token in enumerate(response):
        row = logprobs[len(example.prompt_ids) + t - 1]
        smooth = -float(row.sum()) / len(row)
        losses.append((1 - label_smoothing) * -float(row[token]) + label_smoothing * smooth)
    return losses


def loop_loss(objective: SFTObjective, policy: Policy, cuts: Sequence[int]) -> float:
    batches, start = [], 0
    for end in (*cuts, len(examples())):
        batches.append(collate(examples()[start:end], 2))
        start = end
    total = sum(float(objective(policy(b), b)["sft"].total.detach()) for b in batches)
    return total / sum(float(objective.denominators(b)["sft"]) for b in batches)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("reduction", ["token", "response"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_loss_equals_the_slow_truth_however_it_is_cut(
    label_smoothing: float, reduction: str, packing: bool
) -> None:
    losses = [slow_losses(example, label_smoothing) for example in examples()]
    if reduction == "token":
        expected = math.fsum(loss for row in losses for loss in row) / sum(
            len(row) for row in losses
        )
    else:
        expected = math.fsum(math.fsum(row) / len(row) for row in losses) / len(losses)
    objective = SFTObjective(label_smoothing, reduction)
    options = LogprobOptions(with_mean_logprobs=label_smoothing > 0)
    policy = (
        PackedPolicy(tiny_llama(), 24, options=options)
        if packing
        else Policy(tiny_llama(), options)
    )
    for cuts in ([], [1], [2, 3], [1, 2, 3]):
        assert loop_loss(objective, policy, cuts) == pytest.approx(expected, rel=1e-6)


def test_a_mean_of_means_would_be_another_loss() -> None:
    losses = [slow_losses(example, 0.0) for example in examples()]
    by_token = math.fsum(loss for row in losses for loss in row) / sum(len(row) for row in losses)
    by_response = math.fsum(math.fsum(row) / len(row) for row in losses) / len(losses)
    assert abs(by_token - by_response) > 0.01


def test_filler_rows_add_nothing() -> None:
    objective, policy = SFTObjective(), Policy(tiny_llama())
    filler = EncodedSet([5, 6], [[7, 8]], weight=0.0)
    one = collate(examples(), 2)
    two = collate([*examples(), filler], 2)
    values = []
    for batch in (one, two):
        term = objective(policy(batch), batch)["sft"]
        values.append(float(term.total.detach()) / float(objective.denominators(batch)["sft"]))
        total, count = term.metrics["nll"]
        assert float(total / count) == pytest.approx(values[0], rel=1e-6)
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_use_targets_decides_what_is_predicted() -> None:
    codec = ChatCodec(byte_level_tokenizer(bos=True))
    demonstration = CandidateSet("id", "\n\nHuman: ask\n\nAssistant:", None, (Candidate(" help"),))
    only = SFTEncoder(RowFitter(codec, 64), use_targets=True)(demonstration)
    whole = SFTEncoder(RowFitter(codec, 64), use_targets=False)(demonstration)
    assert only is not None and whole is not None
    prompt, response = (
        codec.encode_prompt(demonstration),
        codec.encode_response(demonstration, " help"),
    )
    assert prompt is not None
    assert (list(only.prompt_ids), list(only.response_ids[0])) == (prompt, response)
    assert list(whole.prompt_ids) == [codec.bos_id]
    assert list(whole.response_ids[0]) == [*prompt[1:], *response]


# Whole runs.


def run(model_folder: Path, data: Path, out: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "num_train_epochs": 4,
        "model_max_length": 100,
        **changes,
    }
    return sft.train(SFTConfig(str(model_folder), str(out), data_path=str(data), **values))


@pytest.fixture(scope="module")
def finished(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "straight"
    run(model_folder, data, out, eval_data_path=str(data), save_steps=3)
    return out


def test_a_run_learns_and_leaves_a_policy(finished: Path, model_folder: Path) -> None:
    rows = metrics_of(finished)
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 8
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert steps[0]["nll"] == pytest.approx(steps[0]["sft_loss"])
    evaluation = json.loads((finished / "manifest.json").read_text())["evaluation"]
    assert evaluation["perplexity"] == pytest.approx(math.exp(evaluation["nll"]))
    assert evaluation["nll"] < steps[0]["nll"]
    AutoModelForCausalLM.from_pretrained(finished / "policy")
    assert not same_weights(finished / "policy", model_folder)


def test_a_run_that_stops_and_resumes_ends_bit_identical(
    finished: Path, model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCut(Exception):
        pass

    calls = iter(range(100))
    original = SFTObjective.__call__

    def failing(self: SFTObjective, outputs: Any, batch: Any) -> Any:
        if next(calls) == 9:  # the fifth step; a checkpoint follows the third
            raise PowerCut
        return original(self, outputs, batch)

    out = tmp_path / "run"
    settings = {"eval_data_path": str(data), "save_steps": 3}
    with monkeypatch.context() as patch:
        patch.setattr(SFTObjective, "__call__", failing)
        with pytest.raises(PowerCut):
            run(model_folder, data, out, **settings)
    run(model_folder, data, out, resume_from_checkpoint=True, **settings)
    assert same_weights(finished / "policy", out / "policy")


def test_packing_changes_no_loss(model_folder: Path, data: Path, tmp_path: Path) -> None:
    losses = []
    for packing in (False, True):
        out = tmp_path / str(packing)
        run(model_folder, data, out, packing=packing, label_smoothing=0.1, max_steps=3)
        losses.append([row["loss"] for row in metrics_of(out)])
    # Rounding alone differs in the first step; Adam makes more of it in the two that follow.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_model_that_cannot_pack_is_refused_before_training(
    model_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rrhf.models.forward.packed_rows.TOLERANCE", -1.0)
    with pytest.raises(UserError, match="--packing"):
        run(model_folder, data, tmp_path / "run", packing=True, max_steps=1)
    run(model_folder, data, tmp_path / "other", packing=False, max_steps=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_targets": False},
        {"sft_reduction": "response", "group_by_length": True},
        {"packing": True, "bf16": True, "gradient_checkpointing": True},
        {"max_response_tokens": 4},
    ],
)
def test_other_settings_train_too(
    model_folder: Path, data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    policy = run(model_folder, data, tmp_path / "run", num_train_epochs=1, **changes)
    assert not same_weights(policy, model_folder)
    assert all(math.isfinite(row["loss"]) for row in metrics_of(tmp_path / "run"))


def test_lora_with_packing(model_folder: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    policy = run(model_folder, data, tmp_path / "run", use_lora=True, packing=True, max_steps=2)
    assert (policy / "adapter" / "adapter_model.safetensors").is_file()


def test_the_manifest_counts(model_folder: Path, tmp_path: Path) -> None:
    rows = [
        {"query": "\n\nHuman: a\n\nAssistant:", "responses": [" help"]},
        {"query": "\n\nHuman: b\n\nAssistant:", "responses": []},
        {"query": "\n\nHuman: c\n\nAssistant:", "responses": [" a", " b"]},
        {"query": "\n\nHuman: d\n\nAssistant:", "responses": [" plants" * 90]},
    ]
    path = write_lines(tmp_path / "mixed.jsonl", rows)
    run(model_folder, path, tmp_path / "run", max_steps=1)
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]
    assert counts["prompts_used"] == 2 and counts["responses_cut"] == 1
    assert counts["read"]["dropped"] == {"no_response": 1, "several_unscored_responses": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing -0.1"),
        ({"max_response_tokens": 0}, "max_response_tokens 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SFTConfig("m", "o", data_path="d", **changes)
