"""The settings of `rrhf train iterative`; the settings of each stage are derived from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from rrhf.errors import UserError
from rrhf.generation.build import ENGINES
from rrhf.generation.config import GenerateConfig, SamplingOptions
from rrhf.ranges import COUNT, NOT_NEGATIVE, SHARE
from rrhf.scoring.config import RemoteScorerOptions, RewardModelOptions, ScoreConfig
from rrhf.training.methods.rank_config import RankConfig, RankSettings

EVALUATION_ROUND = 1_000_000_000
"""Number of the sampling round of all evaluations; no round of a run has so large a number."""

_OF_EVERY_SAMPLING = ("seed", "chat_format", "accept_edited_files", "columns")
_OF_EVALUATIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "stop_strings",
    "max_prompt_tokens",
    "per_device_prompt_batch_size",
)


@dataclass
class IterativeConfig(RemoteScorerOptions, SamplingOptions, RankSettings):
    """Train a policy by RRHF in rounds (the paper's IP-n): each round samples with the policy of
    the round before, scores the samples, and trains on their ranking."""

    reward_model_name_or_path: str = field(
        kw_only=True, metadata={"names": "scorer", "aliases": ["scorer"]}
    )
    """What scores responses: a reward model (folder, run or hub name), function:module:name,
    gold:WORLD, package.module:name of your own Scorer, judge:PRESET, http://HOST/PATH, or several
    as one (mean:A,B)."""

    train_datasets: str = field(
        kw_only=True, metadata={"names": "data", "aliases": ["prompts", "data_path", "prompt_file"]}
    )
    """Prompts: a file, a registered name, package.module:name, as name[:proportion[:path]], several
    separated by commas. Responses in the data (human:chosen, human:rejected) are ranked
    with the samples of every round, unless add_dataset_responses is false."""

    num_rounds: int = 2
    """Rounds of sampling, scoring and training. To continue a finished run, resume it with
    a larger number."""

    train_from: Literal["previous", "first"] = "previous"
    """The weights from which a round's training starts: those of the round before, or always those
    of model_name_or_path. In both cases the previous round's policy samples."""

    kl_coeff: float = 0.0
    """Coefficient of the KL penalty: from the second round on, kl_coeff * (log p - log p_first), in
    nats, is subtracted from a response's score (the paper's r - kl_coeff * KL, with 0.01)."""

    measure_kl: bool = True
    """Measure the KL divergence of every round's samples from the first policy: one forward pass of
    two models over all candidates. Required by kl_coeff."""

    eval_datasets: str | None = field(default=None, metadata={"names": "data"})
    """Held-out prompts, which every round's policy answers once, by sampling. The answers are
    scored, and the best round's policy is kept in best/policy; load_best_model_at_end makes it the
    trained model."""

    reward_format: Literal["standard", "trlx"] = "standard"
    """Layout of the reward model, as in `rrhf score`."""

    reward_base: str | None = field(default=None, metadata={"names": "place"})
    """With reward_format trlx: folder of the base model, as in `rrhf score`."""

    engine: str = field(default="local", metadata={"registry": ENGINES})
    """What writes the samples: local = the model in this process; vllm = a vLLM server that is
    running, and is given each round's policy; package.module:name = your own engine."""

    engine_settings: Any = field(default=None, metadata={"settings_of": "engine"})

    max_unscored_fraction: float = 0.01
    """Stop if the scorer fails on more than this share of a round's candidates. Candidates that
    exceed a reward model's window are left out and counted, whatever their share."""

    RANGES: ClassVar = {
        "num_rounds": COUNT,
        "kl_coeff": NOT_NEGATIVE,
        "max_unscored_fraction": SHARE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        settings = ENGINES[self.engine].settings
        if self.engine_settings is None and settings is not None:
            self.engine_settings = settings()
        if not getattr(self.engine_settings, "check_weights", True):
            raise UserError(
                "--check_weights false: every round samples from another policy, which the server "
                "is given only after a comparison; leave it out"
            )
        if self.kl_coeff and not self.measure_kl:
            raise UserError(f"--kl_coeff {self.kl_coeff} needs --measure_kl true")
        if self.only_use_provide:
            raise UserError("--only_use_provide: no sample of a round would be used; leave it out")
        for name in ("eval_steps", "metric_for_best_model", "early_stopping_patience"):
            if getattr(self, name):
                raise UserError(
                    f"--{name}: every round is evaluated at its end, by the mean score of its "
                    "answers; leave it out"
                )
        if self.load_best_model_at_end and self.eval_datasets is None:
            raise UserError(
                "--load_best_model_at_end: needs --eval_datasets, to find the best round"
            )
        if self.num_return_sequences < 2 and not self.add_dataset_responses:
            raise UserError(
                f"--num_return_sequences {self.num_return_sequences}: ranking compares the "
                "responses to a prompt; set it to 2 or more"
            )
        # Every stage checks its own settings, before the first one begins.
        self.generation("policy", Path(self.output_dir, "x.jsonl"), 1)
        self.scoring(Path("a"), Path("b"))

    def generation(self, policy: str, output: Path, round_number: int) -> GenerateConfig:
        """Build the settings of `rrhf generate` in a round.

        Args:
            policy: folder or hub name of the policy that samples.
            output: the candidate file.
            round_number: from 1; each round draws different responses.
        """
        return self._drawn(
            policy,
            str(output),
            [item.name for item in fields(SamplingOptions)],
            prompts=self.train_datasets,
            round=round_number,
            policy="" if round_number == 1 else f"round-{round_number - 1}",
        )

    def evaluation(self, policy: str, output: Path, name: str) -> GenerateConfig:
        """Build the settings of `rrhf generate` for held-out prompts: one sample each, no
        filters."""
        assert self.eval_datasets is not None, "there is nothing to evaluate on"
        config = self._drawn(
            policy,
            str(output),
            _OF_EVALUATIONS,
            prompts=self.eval_datasets,
            round=EVALUATION_ROUND,
            policy=name,
            num_return_sequences=1,
            add_dataset_responses=False,
        )
        config.columns_may_miss = True  # --columns may name columns of the training data
        return config

    def _drawn(
        self, model: str, output_file: str, same: Sequence[str], **values: Any
    ) -> GenerateConfig:
        """Build sampling settings; the fields named in `same` are copied from this config."""
        return GenerateConfig(
            model,
            output_file=output_file,
            **{name: getattr(self, name) for name in (*same, *_OF_EVERY_SAMPLING)},
            **self._model_options(),
            wait_seconds=self.ddp_timeout,
            engine=self.engine,
            engine_settings=self.engine_settings,
            **values,
        )

    def scoring(self, candidates: Path, output: Path) -> ScoreConfig:
        """Build the settings of `rrhf score` in a round."""
        return ScoreConfig(
            input_file=str(candidates),
            output_file=str(output),
            scorer=self.reward_model_name_or_path,
            max_unscored_fraction=self.max_unscored_fraction,
            reward_format=self.reward_format,
            reward_base=self.reward_base,
            scorer_hosts=self.scorer_hosts,
            **self._model_options(),
            accept_edited_files=self.accept_edited_files,
            wait_seconds=self.ddp_timeout,
        )

    def reward_options(self) -> RewardModelOptions:
        """Return the options of the reward model, for `check_scorer`."""
        return RewardModelOptions(
            reward_format=self.reward_format,
            reward_base=self.reward_base,
            trust_remote_code=self.trust_remote_code,
            scorer_hosts=self.scorer_hosts,
        )

    def ranking(self, policy: str, data: Path, output_dir: Path, resume: bool) -> RankConfig:
        """Build the settings of `rrhf train rank` in a round."""
        settings: dict[str, Any] = {
            item.name: getattr(self, item.name) for item in fields(RankSettings)
        }
        settings |= {
            "model_name_or_path": policy,
            "output_dir": str(output_dir),
            "resume_from_checkpoint": resume,
            "load_best_model_at_end": False,  # it compares steps; `iterative` compares rounds
            "columns": None,  # --columns is for the prompts; candidate files have standard names
        }
        return RankConfig(**settings, data_path=str(data))

    def _model_options(self) -> dict[str, Any]:
        return {
            "bf16": self.bf16,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }
