"""The shapes that steps are measured at: a small Llama of random weights, one prompt, N responses.

Legend: H hidden, L layers, V vocabulary, P prompt tokens, R response tokens, N responses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf.data.collate import EncodedSet, TokenBatch, collate


@dataclass(frozen=True)
class Shape:
    """One shape.

    Attributes:
        hidden, layers, vocabulary: of the model.
        prompt: tokens.
        responses: tokens of each.
        heads, key_heads: of its attention.
        mlp: width of its MLP; None = 2.5 times as wide as H.
    """

    hidden: int
    layers: int
    vocabulary: int
    prompt: int
    responses: tuple[int, ...]
    heads: int = 8
    key_heads: int = 4
    mlp: int | None = None

    @property
    def intermediate(self) -> int:
        return self.mlp or 5 * self.hidden // 2

    @property
    def body_parameters(self) -> int:
        """Weights that each token is multiplied by, the head left out."""
        grouped = self.hidden * self.key_heads // self.heads
        attention = 2 * self.hidden * (self.hidden + grouped)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def __str__(self) -> str:
        shortest, longest = min(self.responses), max(self.responses)
        length = f"{shortest}" if shortest == longest else f"{shortest}..{longest}"
        thousands, rest = divmod(self.vocabulary, 1024)
        vocabulary = self.vocabulary if rest else f"{thousands}k"
        return (
            f"H{self.hidden} L{self.layers} V{vocabulary} "
            f"P{self.prompt} R{length} N{len(self.responses)}"
        )

    def config(self) -> LlamaConfig:
        """Of the model."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=2048,
        )

    def model(self) -> LlamaForCausalLM:
        """The same weights each time."""
        torch.manual_seed(0)
        return LlamaForCausalLM._from_config(self.config(), attn_implementation="sdpa")

    def batch(self, scores: list[float] | None = None) -> TokenBatch:
        """The same random tokens each time."""
        generator = torch.Generator().manual_seed(1)

        def ids(length: int) -> list[int]:
            return torch.randint(3, self.vocabulary, (length,), generator=generator).tolist()

        prompt = ids(self.prompt)
        responses = [ids(length) for length in self.responses]
        return collate([EncodedSet(prompt, responses, scores)], pad_id=0)

    def work(self) -> Work:
        """Multiplications of one forward pass."""
        count, longest = len(self.responses), max(self.responses)
        head = self.hidden * self.vocabulary
        width = self.prompt + longest
        pair = 2 * self.hidden * self.layers  # scores and weighted values of one query and key
        tokens = sum(self.responses)
        seen = self.prompt**2 / 2 + sum(r * self.prompt + r**2 / 2 for r in self.responses)
        return Work(
            rows_body=count * width * self.body_parameters + count * width**2 * pair,
            rows_head=count * width * head,
            body=(self.prompt + tokens) * self.body_parameters + seen * pair,
            head=tokens * head,
        )

    def theory(self) -> float:
        """The ratio of floating-point operations, original-style over shared prefix."""
        work = self.work()
        return (work.rows_body + work.rows_head) / (work.body + work.head)


@dataclass(frozen=True)
class Work:
    """Multiplications of one forward pass; a backward pass costs twice as many.

    Attributes:
        rows_body: padded rows, each with its prompt, dense attention.
        rows_head: the head at every position of them.
        body: every prompt once, exact causal attention.
        head: at response positions; logits kept.
    """

    rows_body: float
    rows_head: float
    body: float
    head: float


SHAPES = {
    "S1": Shape(256, 4, 8192, 256, (64,) * 4),
    "S3": Shape(512, 6, 32768, 512, (96,) * 6),
    "S5": Shape(256, 4, 32768, 256, (32, 51, 70, 90, 109, 128)),
    "S4": Shape(256, 4, 131072, 256, (64,) * 4),
    "S6": Shape(512, 4, 32768, 128, (128,) * 4),
    "B6": Shape(256, 4, 32768, 256, (64,) * 4),
}
"""S6 is the unfavourable one: a prompt no longer than its responses leaves little to share."""
