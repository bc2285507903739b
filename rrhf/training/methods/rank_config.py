"""The settings of `rrhf train rank`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rrhf.errors import UserError
from rrhf.training.core.config import TrainingConfig, check_response_limit
from rrhf.training.methods.objectives import OBJECTIVES


@dataclass
class RankSettings(TrainingConfig):
    """The objective, and which candidates it is trained on."""

    objective: str = field(default="rrhf", metadata={"registry": OBJECTIVES})
    """What is minimised; raft is cross-entropy on the best candidate alone."""

    objective_settings: Any = field(default=None, metadata={"settings_of": "objective"})

    only_use_provide: bool = False
    """Use only candidates that came with the data (source human:*, else the last two of a line)."""

    only_use_sample: bool = False
    """Use only sampled candidates (source not human:*, else all but the last two of a line)."""

    stop_response: bool = False
    """Cut a response where it begins another turn (Human: or Assistant: after a blank line)."""

    max_response_tokens: int | None = None
    """Most tokens of a response; by default what the prompt leaves of model_max_length, at least
    half of it."""

    long_responses: Literal["cut", "drop"] = "cut"
    """What to do with responses that do not fit: cut them (they then end without EOS), or drop
    them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only_use_provide and self.only_use_sample:
            raise UserError(
                "--only_use_provide and --only_use_sample together leave no candidate; give one"
            )
        settings = OBJECTIVES[self.objective].settings
        if self.objective_settings is None and settings is not None:
            self.objective_settings = settings()
        check_response_limit(self.max_response_tokens, self.model_max_length)


@dataclass
class RankConfig(RankSettings):
    """Train a policy so that its likelihoods rank scored candidates as their scores do."""

    data_path: str = field(kw_only=True, metadata={"names": "data"})
    """Scored candidates: a candidate file (query, responses, scores), or preference pairs."""

    eval_data_path: str | None = field(default=None, metadata={"names": "data"})
    """Held-out data of the same kind: its losses and ranking accuracy are logged at eval_steps."""
