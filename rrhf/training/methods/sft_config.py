"""The settings of `rrhf train sft`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rrhf.errors import UserError
from rrhf.ranges import BELOW_ONE, check_ranges
from rrhf.training.core.config import TrainingConfig, check_response_limit


@dataclass
class SFTConfig(TrainingConfig):
    """Fine-tune a policy on demonstrations: prompts, each with the response to learn (SFT)."""

    data_path: str = field(kw_only=True, metadata={"names": "data"})
    """Demonstrations: a file, a registered name, package.module:name, as name[:proportion[:path]],
    several separated by commas."""

    eval_data_path: str | None = field(default=None, metadata={"names": "data"})
    """Held-out demonstrations: their loss and perplexity are logged at eval_steps."""

    use_targets: bool = True
    """Loss on the responses only; false = on the whole sequence, prompt included."""

    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over the vocabulary."""

    packing: bool = False
    """Pack several demonstrations into each row of model_max_length tokens, instead of padding."""

    sft_reduction: Literal["token", "response"] = "token"
    """Average over all target tokens, or over responses by their token means."""

    max_response_tokens: int | None = None
    """Most tokens of a response; by default what the prompt leaves of model_max_length, at least
    half of it."""

    long_responses: Literal["cut", "drop"] = "cut"
    """What to do with responses that do not fit: cut them (they then end without EOS), or drop
    them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"label_smoothing": BELOW_ONE})
        if self.packing and self.layout not in ("auto", "padded"):
            raise UserError(
                f"--packing and --layout {self.layout} both say how rows are laid; give one"
            )
        check_response_limit(self.max_response_tokens, self.model_max_length)
