"""The commands and their flags."""

from __future__ import annotations

import pytest

from rrhf.cli import response_gen
from rrhf.cli.fields import Flag, flags_of
from rrhf.cli.main import main
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.scorers.config import EvaluateRewardConfig
from rrhf.generation.config import GenerateConfig
from rrhf.generation.vllm.start import StartVLLMConfig
from rrhf.scoring.config import ScoreConfig
from rrhf.scoring.http.server_config import ServeRewardConfig
from rrhf.training.methods.rank_config import RankConfig
from rrhf.training.methods.reward_config import RewardConfig
from rrhf.training.methods.sft_config import SFTConfig
from rrhf.training.online.ppo_config import PPOConfig
from rrhf.training.rounds.iterative_config import IterativeConfig

COMMANDS: dict[str, type] = {
    "generate": GenerateConfig,
    "score": ScoreConfig,
    "engine vllm start": StartVLLMConfig,
    "serve-reward": ServeRewardConfig,
    "response-gen": response_gen.ResponseGenConfig,
    "evaluate": EvaluateConfig,
    "evaluate-reward": EvaluateRewardConfig,
    "train sft": SFTConfig,
    "train reward": RewardConfig,
    "train rank": RankConfig,
    "train iterative": IterativeConfig,
    "train ppo": PPOConfig,
}


def flags_for(command: str) -> dict[str, Flag]:
    if command == "response-gen":
        return response_gen.all_flags(GenerateConfig, ScoreConfig)
    return flags_of(COMMANDS[command])


FLAGS = {command: flags_for(command) for command in COMMANDS}
PPO = ["--model=m", "--output_dir=o", "--train_datasets=d", "--scorer=r"]


def error_of(capsys: pytest.CaptureFixture[str], *line: str) -> str:
    """Run a command that must be refused; returns its message."""
    assert main(list(line)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and "Traceback" not in err
    return err.removeprefix("error: ").strip()
