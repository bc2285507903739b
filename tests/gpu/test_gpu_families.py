"""Every layout on tiny models of seven families: float32 as padded rows, bfloat16 near them."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from layout_cases import MODELS, SHAPES, SMALL, V, step
from layout_cases import model as tiny
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from benchmarks.gpu.layouts import HALF_FACTOR, distances, numbers
from rrhf.errors import UserError
from rrhf.models.forward.layouts import FastPolicy, build_policy
from rrhf.models.forward.logprobs import Policy

LAYOUTS = ("rows", "shared_prefix", "dense_mask")

# Kernels want heads of 16 at least, and multiples of 8.
WIDE: dict[str, Any] = {**SMALL, "hidden_size": 128, "intermediate_size": 192}
GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2, "head_dim": 32}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
    "gpt2": GPT2Config(vocab_size=V, n_embd=128, n_layer=2, n_head=4, initializer_range=0.1),
    "gpt_neox": GPTNeoXConfig(**WIDE),
    "mistral_window": MistralConfig(**GROUPED, sliding_window=7),
    "gemma3_window": Gemma3TextConfig(
        **GROUPED,
        sliding_window=7,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
COMPILED = ("llama", "mistral_window")
"""FlexAttention is compiled for each of them, some ten seconds."""

KERNELS = [("varlen_attention", name) for name in CONFIGS]
KERNELS += [("flex_attention", name) for name in COMPILED]


def model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return made


def require_close(made: Any, layout: str, device: str, tolerance: float = 2e-5) -> None:
    for b in SHAPES.values():
        batch = b.to(device)
        policy = FastPolicy(made().to(device), layout)
        found = step(policy, batch)
        expected = step(Policy(made().to(device)), batch)
        torch.testing.assert_close(found[1], expected[1], atol=5 * tolerance, rtol=0.0)
        assert float((found[2] - expected[2]).norm() / expected[2].norm()) < tolerance


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32(name: str, layout: str, device: str) -> None:
    require_close(lambda: tiny(name), layout, device)


@pytest.mark.parametrize("name", CONFIGS)
def test_wide_ones_in_float32(name: str, device: str) -> None:
    require_close(lambda: model(name), "shared_prefix", device)


@pytest.mark.parametrize(("layout", "name"), KERNELS)
def test_kernels_in_float32(layout: str, name: str, cuda: str) -> None:
    """Varlen attention leaves float32 to SDPA; FlexAttention multiplies in it."""
    require_close(lambda: model(name), layout, cuda, 1e-4)


def require_near(made: Any, layout: str, device: str) -> None:
    """As near to float32 as padded rows in bfloat16 are, but for a factor."""

    def half(padded: bool) -> Policy:
        one = made().bfloat16().to(device)
        return Policy(one) if padded else FastPolicy(one, layout)

    batch = SHAPES["ragged"].to(device)
    exact = numbers(Policy(made().bfloat16().float().to(device)), batch)
    allowed = distances(numbers(half(True), batch), exact)
    found = distances(numbers(half(False), batch), exact)
    for measure, distance in found.items():
        # With 32 hidden units a distance is a sum of few numbers: half as much again for scatter.
        assert distance <= 1.5 * HALF_FACTOR * allowed[measure], (measure, distance, allowed)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16(name: str, layout: str, device: str) -> None:
    require_near(lambda: tiny(name), layout, device)


@pytest.mark.parametrize("name", CONFIGS)
def test_wide_ones_in_bfloat16(name: str, device: str) -> None:
    require_near(lambda: model(name), "shared_prefix", device)


@pytest.mark.parametrize(("layout", "name"), KERNELS)
def test_kernels_in_bfloat16(layout: str, name: str, cuda: str) -> None:
    require_near(lambda: model(name), layout, cuda)


@pytest.mark.parametrize("layout", ["auto", "shared_prefix", "varlen_attention", "flex_attention"])
def test_the_trial_admits_them(layout: str, cuda: str) -> None:
    policy = build_policy(model("llama").to(cuda), layout)
    assert isinstance(policy, FastPolicy)
    assert policy.layout == ("shared_prefix" if layout == "auto" else layout)


def test_flash_attention(cuda: str) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("the package flash-attn is not installed")
    made = model("llama").to(cuda)
    made.set_attn_implementation("flash_attention_2")
    policy = build_policy(made, "auto")
    assert isinstance(policy, FastPolicy)
    assert policy.model.config._attn_implementation == "rrhf_shared_prefix_varlen"


def test_varlen_attention_without_a_gpu(device: str) -> None:
    if device == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="needs a CUDA GPU"):
        build_policy(model("llama"), "varlen_attention")
