"""Every layout against padded rows, at a width where kernels work as they do on real models.

float32: both sides round the same sums in another order. A sum of n products in random order is off
by about u sqrt(n) of its size, u = 2**-24; a token's path through the model adds up 4 H + 2 M
products a layer, so `exact_bound` allows 4 u sqrt(L (4 H + 2 M)), four times what is expected, of
the log-probs' root mean square and of the gradient's norm. A response that does not see its prompt,
or sees another, is off by more than a tenth.

bfloat16: results are rounded to 8 bits after every operation, so that two right ways differ by a
percent or more, and a fixed bound would have to be so wide that faults pass. What is right is told
by a third side: padded rows in float32 with the same (rounded) weights. A layout may be no further
from it than `HALF_FACTOR` times as far as padded rows in bfloat16 are, in both measures. Both
distances are sums over thousands of numbers and scatter by a few percent; a factor of two leaves
room for kernels that round in other places.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from benchmarks.gpu.setting import Setting, check, require_gpu, require_package
from benchmarks.harness import NotMeasured
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.models.forward.layouts import FastPolicy
from rrhf.models.forward.logprobs import Policy

ROUNDING = 2.0**-24
HALF_FACTOR = 2.0

LAYOUTS = {
    "rows": "sdpa",
    "shared_prefix": "sdpa",
    "dense_mask": "sdpa",
    "varlen_attention": "sdpa",
    "flex_attention": "sdpa",
    "flash_attention_2": "flash_attention_2",
}
"""Attention that the model is loaded with; the last is `shared_prefix` over flash-attn."""

FAMILIES = ("llama", "window")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def items(setting: Setting) -> list[str]:
    return [
        f"{layout} {dtype} {family}"
        for layout in LAYOUTS
        for dtype in DTYPES
        for family in FAMILIES
    ]


def require(item: str, setting: Setting) -> None:
    """Raises NotMeasured where a layout has no place."""
    layout, dtype, _ = item.split()
    if layout == "flash_attention_2":
        require_gpu(setting)
        require_package("flash_attn", layout)
        if dtype == "float32":
            raise NotMeasured("flash-attn computes in half precision only")
    if layout in ("varlen_attention", "flex_attention"):
        require_gpu(setting)


def run(item: str, setting: Setting) -> dict[str, Any]:
    require(item, setting)
    layout, dtype, family = item.split()
    return compare(layout, dtype, family, setting.device, setting.tiny)


def compare(layout: str, dtype: str, family: str, device: str, tiny: bool) -> dict[str, Any]:
    """One layout on one model: the distances, the bounds, and whether they hold."""
    batch = ragged(tiny).to(device)
    exact = numbers(Policy(model(family, "float32", device, tiny)), batch)
    attention = LAYOUTS[layout]
    name = "shared_prefix" if layout == "flash_attention_2" else layout
    fast = FastPolicy(model(family, dtype, device, tiny, attention), name)
    found = distances(numbers(fast, batch), exact)
    if dtype == "float32":
        allowed = dict.fromkeys(found, exact_bound(fast.model.config))
    else:
        padded = distances(numbers(Policy(model(family, dtype, device, tiny)), batch), exact)
        allowed = {name: HALF_FACTOR * distance for name, distance in padded.items()}
    passed = all(found[name] <= allowed[name] for name in found)  # false where one is not a number
    line = ", ".join(f"{name} off by {found[name]:.1e} of {allowed[name]:.1e}" for name in found)
    return check(passed, line, distances=found, allowed=allowed)


def exact_bound(config: Any) -> float:
    """As the module's text derives it."""
    products = config.num_hidden_layers * (4 * config.hidden_size + 2 * config.intermediate_size)
    return 4 * ROUNDING * math.sqrt(products)


def model(family: str, dtype: str, device: str, tiny: bool, attention: str = "sdpa") -> nn.Module:
    """The same weights each time on a device, rounded to bfloat16 whatever they are kept in."""
    width, layers = (32, 2) if tiny else (1024, 8)
    sizes: dict[str, Any] = {
        "vocab_size": 96 if tiny else 32000,
        "hidden_size": width,
        "intermediate_size": 2 * width + width // 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 4 if tiny else 16,
        "num_key_value_heads": 2 if tiny else 4,
        "max_position_embeddings": 2048,
        # Large enough that attention is far from even: who sees whom shows in every number.
        "initializer_range": 1.3 / math.sqrt(width),
    }
    torch.manual_seed(0)
    with torch.device(device):
        if family == "window":
            config = MistralConfig(**sizes, sliding_window=7 if tiny else 200)
            made = MistralForCausalLM._from_config(config, attn_implementation=attention)
        else:
            config = LlamaConfig(**sizes)
            made = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    return made.bfloat16().to(DTYPES[dtype])


def ragged(tiny: bool) -> TokenBatch:
    """Prompts and responses of many lengths, some of one token, some alone."""
    shapes = [(9, [4, 1, 7, 12]), (3, [5, 5]), (6, [8]), (1, [1, 1, 2])]
    if not tiny:
        shapes = [(701, [130, 1, 77, 200]), (64, [129, 128]), (300, [150]), (1, [1, 60, 2])]
    size = 96 if tiny else 32000
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, size, (length,), generator=generator).tolist()

    return collate([EncodedSet(ids(p), [ids(r) for r in rs]) for p, rs in shapes], pad_id=0)


def numbers(policy: Policy, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """Log-probs of the response tokens, and the gradient of a smooth function of them.

    A ranking loss would not do: where two responses nearly tie, rounding turns its gradient over.
    """
    logprobs = policy.eval()(batch).logprobs[batch.response_mask]
    weights = torch.arange(len(logprobs), device=logprobs.device).mul(2.4).cos()
    (logprobs * weights).mean().backward()
    gradients = [p.grad.float().flatten() for p in policy.parameters() if p.grad is not None]
    return logprobs.detach().float().cpu(), torch.cat(gradients).cpu()


def distances(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Root mean square of the log-probs' differences, and the gradient's over its norm."""
    logprobs = (found[0] - exact[0]).square().mean().sqrt() / exact[0].std().clamp_min(1.0)
    gradient = (found[1] - exact[1]).norm() / exact[1].norm()
    return {"log-probs": float(logprobs), "gradient": float(gradient)}
