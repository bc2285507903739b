"""The policy folder: with adapters too, a plain folder, also where the model holds shards only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import byte_level_tokenizer, tiny_llama
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from rrhf.models.lora import add_lora
from rrhf.models.saving import merged_weights, write_model_folder

pytest.importorskip("peft")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def adapted(model: Any, targets: list[str] | None = None, head: str | None = None) -> Any:
    """With adapters that change something; a new pair of them changes nothing."""
    kind = "CAUSAL_LM" if head is None else "SEQ_CLS"
    adapted = add_lora(model, 4, 8, 0.0, targets, [head] if head else None, kind).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    return adapted


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    )


def classifier() -> LlamaForSequenceClassification:
    config = tiny_llama().config
    config.num_labels = 1
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize(
    "model, auto_class",
    [
        pytest.param(lambda: adapted(tiny_llama()), AutoModelForCausalLM, id="linear"),
        pytest.param(lambda: adapted(tiny_gpt2()), AutoModelForCausalLM, id="transposed"),
        pytest.param(
            lambda: adapted(tiny_llama(), ["embed_tokens", "q_proj"]),
            AutoModelForCausalLM,
            id="embedding",
        ),
        pytest.param(
            lambda: adapted(classifier(), None, "score"),
            AutoModelForSequenceClassification,
            id="head",
        ),
    ],
)
def test_adapters_are_merged_from_the_weights_that_are_given(
    model: Any, auto_class: Any, tmp_path: Path
) -> None:
    """Not from the model's own: under sharded training those are pieces on every rank."""
    trained = model()
    with torch.no_grad():
        want = trained(input_ids=IDS).logits
        full = {name: value.clone() for name, value in trained.state_dict().items()}
        for parameter in trained.parameters():
            parameter.zero_()
    write_model_folder(tmp_path, trained, byte_level_tokenizer(), full)
    with torch.no_grad():
        got = auto_class.from_pretrained(tmp_path).eval()(input_ids=IDS).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_merging_leaves_the_model_as_it_is() -> None:
    trained = adapted(tiny_llama())
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    merged_weights(trained, trained.state_dict())
    after = trained.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
