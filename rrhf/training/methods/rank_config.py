"""The settings of `rrhf train rank`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rrhf.errors import UserError
from rrhf.ranges import NOT_NEGATIVE, check_ranges
from rrhf.training.core.config import TrainingConfig, check_response_limit


@dataclass
class RankSettings(TrainingConfig):
    """RRHF's loss and what it reads of the candidates; the defaults are the paper's."""

    rrhf_mode: Literal["paper", "released"] = "paper"
    """paper = the published equations; released = the published program, fault for fault."""

    rrhf_weight: float = 1.0
    """Weight of the rank term; 0 = fine-tuning on the best candidate alone."""

    length_penalty: float = 1.0
    """Candidates are ranked by log-prob / tokens ** this; larger favours longer responses."""

    rank_reduction: Literal["prompt", "pair"] = "prompt"
    """Rank term: sum over a prompt's pairs, averaged over prompts; or averaged over all pairs."""

    sft_reduction: Literal["prompt", "response", "token"] = "prompt"
    """SFT term: token sum, or token mean, of each best response; or the mean of all tokens."""

    only_use_provide: bool = False
    """Use only candidates that came with the data (source human:*, else the last two of a line)."""

    only_use_sample: bool = False
    """Use only sampled candidates (source not human:*, else all but the last two of a line)."""

    stop_response: bool = False
    """Cut responses where they write the next turn (Human: or Assistant: after a blank line)."""

    max_response_tokens: int | None = None
    """Most tokens of a response; by default what the prompt leaves, at least half of the length."""

    long_responses: Literal["cut", "drop"] = "cut"
    """Responses that do not fit: cut (they then end without EOS) or leave out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_use_provide and self.only_use_sample:
            raise UserError(
                "--only_use_provide and --only_use_sample together leave no candidate; give one"
            )
        check_ranges(self, {"rrhf_weight": NOT_NEGATIVE})
        check_response_limit(self.max_response_tokens, self.model_max_length)
        reductions = (self.rank_reduction, self.sft_reduction)
        if self.rrhf_mode == "released" and reductions != ("prompt", "prompt"):
            raise UserError(
                "--rrhf_mode released has reductions of its own; leave out --rank_reduction and "
                "--sft_reduction, or use --rrhf_mode paper"
            )


@dataclass
class RankConfig(RankSettings):
    """Train a policy so that its likelihoods rank scored candidates as their scores do (RRHF)."""

    data_path: str = field(kw_only=True, metadata={"names": "data"})
    """Scored candidates: a candidate file (query, responses, scores), or preference pairs."""

    eval_data_path: str | None = field(default=None, metadata={"names": "data"})
    """Held-out data of the same kind: its losses and ranking accuracy are logged at eval_steps."""
