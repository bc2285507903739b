"""Every number of every configuration: what is infinite, NaN or out of range is refused."""

from __future__ import annotations

import importlib
import math
import pkgutil
import typing
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hh_reward import HHRewardConfig

import rrhf
from rrhf.cli.main import main
from rrhf.endpoints.settings import EndpointSettings
from rrhf.errors import UserError
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.scorers.config import EvaluateRewardConfig
from rrhf.generation.config import GenerateConfig
from rrhf.generation.vllm.settings import VLLMSettings
from rrhf.generation.vllm.start import StartVLLMConfig
from rrhf.ranges import Interval, check_ranges
from rrhf.report.config import CompareConfig
from rrhf.scoring.config import ScoreConfig
from rrhf.scoring.http.scorer import HttpScorerSettings
from rrhf.scoring.http.server_config import ServeRewardConfig
from rrhf.scoring.judges.settings import JudgeSettings
from rrhf.studies.config import DemoConfig, MethodsConfig, StudyConfig
from rrhf.training.methods.objectives import OBJECTIVES
from rrhf.training.methods.rank_config import RankConfig
from rrhf.training.methods.reward_config import RewardConfig
from rrhf.training.methods.sft_config import SFTConfig
from rrhf.training.online.methods import RankMethodSettings
from rrhf.training.online.ppo_config import PPOConfig
from rrhf.training.rounds.iterative_config import IterativeConfig

ONLINE = {"train_datasets": "p", "reward_model_name_or_path": "r"}
CONFIGS: dict[type, dict[str, Any]] = {
    SFTConfig: {"model_name_or_path": "m", "output_dir": "o", "data_path": "d"},
    RewardConfig: {"model_name_or_path": "m", "output_dir": "o", "data_path": "d"},
    RankConfig: {"model_name_or_path": "m", "output_dir": "o", "data_path": "d"},
    PPOConfig: {"model_name_or_path": "m", "output_dir": "o", **ONLINE},
    IterativeConfig: {"model_name_or_path": "m", "output_dir": "o", **ONLINE},
    GenerateConfig: {"model_name_or_path": "m", "prompts": "p", "output_file": "o.jsonl"},
    ScoreConfig: {"input_file": "i", "output_file": "o", "scorer": "s"},
    EvaluateConfig: {"model_name_or_path": "m", "prompts": "p", "output_dir": "o"},
    EvaluateRewardConfig: {"scorers": ["s"], "data_path": "d", "output_dir": "o"},
    CompareConfig: {"rows": ["r"]},
    ServeRewardConfig: {"scorer": "s"},
    HttpScorerSettings: {},
    JudgeSettings: {"model": "m", "base_url": ("http://127.0.0.1:1/v1",)},
    **{spec.settings: {} for spec in OBJECTIVES.values() if spec.settings},
    RankMethodSettings: {},
    EndpointSettings: {"base_url": ("http://127.0.0.1:1/v1",)},
    VLLMSettings: {},
    StartVLLMConfig: {"model_name_or_path": "m"},
    DemoConfig: {},
    MethodsConfig: {},
    StudyConfig: {},
    HHRewardConfig: {"data_path": "d", "output_dir": "o"},
}
MAY_BE_NEGATIVE = {
    "seed": "a seed is only a name",
    "margin": "a negative margin lets the worse response lead by so much",
    "length_penalty": "a negative one favours short sequences",
    "score_threshold": "scores are of any sign",
    "humanline_low": "the least log ratio is negative",
}


def numbers() -> list[tuple[type, str, type]]:
    found = []
    for config in CONFIGS:
        hints = typing.get_type_hints(config)
        for item in fields(config):
            kinds = {hints[item.name], *typing.get_args(hints[item.name])} & {int, float}
            found += [(config, item.name, kind) for kind in kinds]
    return found


NUMBERS = numbers()


@pytest.mark.parametrize("kind", [int, float])
def test_every_number_has_a_range(kind: type) -> None:
    """None is let through that is not finite, or below zero where that means nothing."""
    wrong = [math.inf, -math.inf, math.nan] if kind is float else []
    let_through = []
    for config, name, its_kind in NUMBERS:
        if its_kind is not kind:
            continue
        tried = [*wrong, *([] if name in MAY_BE_NEGATIVE else [kind(-2)])]
        for value in tried:
            try:
                config(**{**CONFIGS[config], name: value})
            except UserError as error:
                assert name in str(error), (config, name, value, error)
            else:
                let_through.append((config.__name__, name, value))
    assert not let_through
    assert len(NUMBERS) > 150


def test_no_configuration_is_forgotten() -> None:
    """Every class that a command line is read into stands in the list above."""
    without_numbers = {"ConvertConfig", "ValidateConfig", "StatsConfig", "FetchConfig"}
    inherited = {base.__name__ for config in CONFIGS for base in config.__mro__}
    inner = {
        "BeamSettings",
        "GroupSettings",
        "ResponseGenConfig",
        "ColumnOptions",
        "DataOptions",
    }
    known = without_numbers | inherited | inner
    for module in pkgutil.walk_packages(rrhf.__path__, "rrhf."):
        is_objective = ".objectives." in module.name
        if (
            not is_objective
            and module.name.split(".")[-1] not in ("config", "data", "convert", "fetch")
            and not (module.name.endswith("_config"))
        ):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            is_read = isinstance(value, type) and is_dataclass(value)
            if is_read and name.endswith(("Config", "Options", "Settings")):
                assert name in known, f"{module.name}.{name}"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--learning_rate", "inf"], "--learning_rate inf: must be a finite number"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: must be 0 or more"),
        (["--adam_beta1", "2"], "--adam_beta1 2.0: must be 0 or more and below 1"),
        (["--adam_beta2", "1"], "--adam_beta2 1.0: must be 0 or more and below 1"),
        (["--adam_epsilon", "0"], "--adam_epsilon 0.0: must be above 0"),
        (["--warmup_ratio", "7"], "--warmup_ratio 7.0: must be between 0 and 1"),
        (["--max_grad_norm", "-1"], "--max_grad_norm -1.0: must be 0 or more"),
        (["--save_steps", "-1"], "--save_steps -1: must be 0 or more"),
        (["--num_train_epochs", "inf"], "--num_train_epochs inf: must be a finite number"),
        (["--max_steps", "0"], "--max_steps 0: must be 1 or more, or -1"),
        (["--seed", "5000000000000000000"], "--seed 5000000000000000000: must be between"),
    ],
)
def test_the_command_refuses_it(
    flags: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    out = tmp_path / "run"
    words = ["train", "sft", "--model_name_or_path", "m", "--data_path", "d", "--output_dir"]
    assert main([*words, str(out), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "held", "left_out", "words"),
    [
        ("[0, 1]", [0, 0.5, 1], [-1e-9, 1.1, math.nan], "between 0 and 1"),
        ("[0, 1)", [0, 0.999], [1, -1], "0 or more and below 1"),
        ("(0, 1]", [1e-9, 1], [0, 2], "above 0 and at most 1"),
        ("(0, inf)", [1e-30, 1e30], [0, math.inf, math.nan], "above 0"),
        ("[2, inf)", [2, 3], [1, 1.9], "2 or more"),
    ],
)
def test_intervals(text: str, held: list[float], left_out: list[float], words: str) -> None:
    interval = Interval.parse(text)
    assert all(value in interval for value in held)
    assert not any(value in interval for value in left_out)
    assert str(interval) == words


def test_a_value_that_stands_alone() -> None:
    config = PPOConfig(**CONFIGS[PPOConfig])
    for value in (-1, 1, 7):
        config.num_rollouts = value
        check_ranges(config, {"num_rollouts": "-1 or [1, inf)"})
    config.num_rollouts = 0
    with pytest.raises(UserError, match="--num_rollouts 0: must be -1 or 1 or more"):
        check_ranges(config, {"num_rollouts": "-1 or [1, inf)"})
