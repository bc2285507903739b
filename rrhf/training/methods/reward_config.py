"""The settings of `rrhf train reward`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rrhf.algorithms.names import TOKEN_LOSS_TYPES
from rrhf.errors import UserError
from rrhf.ranges import BELOW_ONE, NOT_NEGATIVE, check_ranges
from rrhf.training.core.config import TrainingConfig, check_response_limit

_RANGES = {
    "validation_fraction": BELOW_ONE,
    "normalizer_momentum": BELOW_ONE,
    "margin_per_score": NOT_NEGATIVE,
    "regularization": NOT_NEGATIVE,
}


@dataclass
class RewardConfig(TrainingConfig):
    """Train a reward model on preference pairs or ranked groups."""

    data_path: str = field(
        kw_only=True,
        metadata={"names": "data", "aliases": ["train_file", "train_data", "train_datasets"]},
    )
    """Preferences: chosen/rejected pairs or scored candidates; a file, a registered name,
    name[:proportion[:path]], several with commas."""

    validation_datasets: str | None = field(
        default=None,
        metadata={
            "names": "data",
            "aliases": ["valid_file", "valid_data", "eval_datasets", "eval_data_path"],
        },
    )
    """Held-out data of the same kind; by default validation_fraction is cut off data_path."""

    validation_fraction: float = 0.1
    """Share of data_path that is held out, by the first human turn; 0 = train on all."""

    loss_type: Literal["sequence-wise", "token-wise", "per_sample", "average", "last_token"] = (
        "sequence-wise"
    )
    """What is compared: the last tokens (sequence-wise = last_token), every position from the first
    difference on (token-wise = per_sample), or the mean over those (average)."""

    pair_reduction: Literal["prompt", "pair"] = "prompt"
    """Mean over each prompt's pairs, then over prompts; or over all pairs at once."""

    margin: float = 0.0
    """The loss is -log sigmoid(lead of the better response - margin)."""

    margin_per_score: float = 0.0
    """A further margin for each unit by which the data's own scores differ (Llama 2's margin)."""

    regularization: float = 0.0
    """Weight of the mean of squared scores, which keeps scores near zero."""

    normalizer_type: Literal["none", "RunningMeanStd", "ExponentialMovingAverage"] = (
        "RunningMeanStd"
    )
    """How mean and deviation of the scores are learnt for later use; none = not at all."""

    normalizer_momentum: float = 0.9
    """ExponentialMovingAverage: new = momentum * old + (1 - momentum) * batch."""

    normalize_score_during_training: bool = False
    """Let the losses see normalised scores too (by what was learnt before this step)."""

    max_response_tokens: int | None = None
    """Most tokens of a response; by default what the prompt leaves, at least half of the length."""

    long_responses: Literal["drop", "cut"] = "drop"
    """Responses that do not fit: leave out with their pairs, or cut, which takes their end off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, _RANGES)
        if self.normalize_score_during_training and self.normalizer_type == "none":
            raise UserError(
                "--normalize_score_during_training needs a normaliser; give --normalizer_type "
                "RunningMeanStd or ExponentialMovingAverage"
            )
        check_response_limit(self.max_response_tokens, self.model_max_length)

    @property
    def reads_tokens(self) -> bool:
        """True where the loss looks at more than each response's last score."""
        return self.loss_type in TOKEN_LOSS_TYPES

    @property
    def reads_padding(self) -> bool:
        """True where the loss reads scores behind the end of the shorter response."""
        return self.reads_tokens and self.loss_type != "average"
