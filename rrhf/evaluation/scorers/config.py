"""The settings of `rrhf evaluate-reward`, which `rrhf.evaluation.scorers.evaluate` carries out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rrhf.data.columns import DataOptions
from rrhf.errors import UserError
from rrhf.evaluation.measure import CONFIDENCE, MAX_UNSCORED_FRACTION, RESAMPLES
from rrhf.ranges import COUNT, INDEX, SHARE
from rrhf.scoring.config import RewardModelOptions


@dataclass(kw_only=True)
class EvaluateRewardConfig(RewardModelOptions, DataOptions):
    """Measure how well reward models, or other scorers, rank responses whose order is known:
    accuracy, best of K, calibration and length bias, with intervals and paired differences."""

    scorers: list[str] = field(
        metadata={
            "names": "scorer",
            "aliases": ["scorer", "reward_model_name_or_path", "reward_model"],
        }
    )
    """What to measure, one or more: reward models (folder, run or hub name),
    function:module:name, gold:WORLD, package.module:name, judge:PRESET#model=NAME,
    http://HOST:PORT/PATH, or ensembles such as mean:A,B."""

    data_path: str = field(metadata={"names": "data", "aliases": ["pairs", "prompts"]})
    """Responses with a known order: pairs, scored or ranked responses, or lists of chosen and
    rejected ones (RewardBench 2); a file, a registered name, a dataset or package.module:name, as
    name[:proportion[:path]]. Scores in the data, where there are any, give the order."""

    output_dir: str = field(metadata={"names": "output folder"})
    """Folder for the results: table.md and, for each scorer, NAME.json and NAME.samples.jsonl (its
    scores)."""

    names: list[str] = field(default_factory=list)
    """Names of the scorers in tables and files, in the same order; by default derived from the
    scorers' own."""

    baseline: str = ""
    """Name of the scorer that the others are compared with; empty = the first."""

    num_prompts: int = 0
    """Use only this many rows of the data, the same ones for every scorer; 0 = all."""

    calibration_bins: int = 10
    """Number of bins for the calibration error. The bins divide the predicted probabilities, 0.5 to
    1, evenly; in each bin, the mean probability is compared with the accuracy."""

    confidence: float = CONFIDENCE
    """Confidence level of the intervals."""

    bootstrap_resamples: int = RESAMPLES
    """Number of times that the prompts are resampled for an interval."""

    max_unscored_fraction: float = MAX_UNSCORED_FRACTION
    """Stop if a scorer fails on more than this share of the responses. Responses that exceed a
    reward model's window are not failures: they are left out and counted."""

    split: str | None = None
    """Split of a named dataset."""

    RANGES: ClassVar = RewardModelOptions.RANGES | {
        "num_prompts": INDEX,
        "calibration_bins": COUNT,
        "bootstrap_resamples": COUNT,
        "max_unscored_fraction": SHARE,
        "confidence": "(0, 1)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorers:
            raise UserError("--scorers: is empty; name a reward model or another scorer")
        if self.names and len(self.names) != len(self.scorers):
            raise UserError(
                f"--names: {len(self.names)} for {len(self.scorers)} scorers; give a name for each"
            )
