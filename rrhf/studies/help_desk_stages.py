"""Stages on the embedded world: each a folder, made once, taken up after a kill.

    world/ -> start/ -> sft/ -> pairs/ -> reward/ -> round-1/ (candidates) -> rrhf/, best-of-n/
                                                     round-2/ (candidates of rrhf/) -> rrhf-2/ ...
                                                     ppo/, rloo/, ... (online, from sft/)

Every stage is the same call that a user's command makes, on the same hand-overs; what is particular
to the embedded world are its settings (`Recipe`, and `help_desk_online` for online methods), chosen
so that a model of 0.4M weights shows what a method does within minutes on one core. Which stages a
study has, and what it measures, the study says.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrhf.data.candidate_files import read_candidate_sets, write_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import AlreadyFinished
from rrhf.files import COMPLETE, write_json, write_manifest
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.stage import GenerateConfig, generate_file
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.models.saving import write_model_folder
from rrhf.runs import settings_file
from rrhf.scoring.stage import ScoreConfig, score_file
from rrhf.staged_folders import saved_folder
from rrhf.studies.help_desk_online import online_config
from rrhf.training.methods import rank, reward, sft
from rrhf.training.methods.objectives.rrhf import RRHFSettings
from rrhf.training.online import ppo
from rrhf.worlds.help_desk.world import HelpDesk
from rrhf.worlds.tiny_model import (
    build_tiny_llama,
    build_tokenizer,
    conversation_texts,
    tiny_size,
)

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 56
MAX_LENGTH = 192
STAGE_FILE = ".stage.json"
"""The note that a stage is done; hidden, since a stage's folder may be a sealed model folder."""
_EARLIER_STAGE_FILE = "stage.json"


@dataclass(frozen=True)
class Recipe:
    """Settings of the study; the defaults are the demo's.

    Attributes:
        samples_per_prompt: N of the candidates, and of best-of-N.
        rrhf_weight: of the rank term, which is added to a token-mean SFT term.
        rrhf_learning_rate, rrhf_epochs: of the first round; the second makes one pass.
        test_samples: sampled responses a test prompt.
    """

    samples_per_prompt: int = 4
    rrhf_weight: float = 0.1
    rrhf_learning_rate: float = 5e-4
    rrhf_epochs: float = 2.0
    test_samples: int = 2


class HelpDeskStages:
    """Attributes:
    folder: of this seed.
    world: the embedded world.
    seconds: what each stage took, by name; of an earlier call where it was done then.
    num_stages: how many a study has, for its lines of progress.
    """

    num_stages = 5

    def __init__(
        self,
        folder: Path,
        size: str = "full",
        seed: int = 0,
        recipe: Recipe | None = None,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.folder = folder
        self.size = size
        self.seed = seed
        self.recipe = recipe or Recipe()
        self.world = HelpDesk(size, seed)
        self.say = say
        self.seconds: dict[str, float] = {}
        self._num_begun = 0

    def prepare(self) -> None:
        """What every method starts from: a fine-tuned policy, and a reward model."""
        self.stage("world", "write the world's texts", self._write_world)
        self.stage("start", "make tokenizer and an untrained Llama", self._make_start)
        self.stage("sft", "fine-tune on demonstrations (SFT)", self._train_sft)
        self.stage("pairs", "sample and label pairs for the reward model", self._label_pairs)
        self.stage("reward", "train the reward model", self._train_reward)

    def stage(self, name: str, what: str, do: Callable[[], object]) -> None:
        """Do what a folder is to hold, unless it holds it already."""
        folder = self.folder / name
        done = folder / STAGE_FILE
        self._num_begun += 1
        what = f"[{self._num_begun}/{self.num_stages}] {what}"
        if (earlier := folder / _EARLIER_STAGE_FILE).is_file():
            earlier.rename(done)
        if done.is_file():
            self.seconds[name] = float(json.loads(done.read_text())["seconds"])
            self.say(f"{what}: done before")
            return
        self.say(f"{what} ...")
        started, cpu_started = time.monotonic(), time.process_time()
        folder.mkdir(parents=True, exist_ok=True)
        # A kill between the end of a training and the note below leaves the training finished.
        with suppress(AlreadyFinished):
            do()
        self.seconds[name] = round(time.monotonic() - started, 1)
        cpu = round(time.process_time() - cpu_started, 1)
        write_json(done, {"stage": name, "seconds": self.seconds[name], "cpu_seconds": cpu})
        self.say(f"{what}: {self.seconds[name]:.0f} s")

    # Stages.

    def _write_world(self) -> None:
        world, folder = self.world, self.folder / "world"
        for name, sets in (
            ("demonstrations", world.demonstrations()),
            ("static_pairs", world.preference_pairs()),
            ("pair_prompts", world.pair_prompts()),
            ("prompts", world.alignment_prompts()),
            ("test_prompts", world.test_prompts()),
            ("held_out_pairs", world.held_out_pairs()),
        ):
            write_candidate_sets(folder / f"{name}.jsonl", sets, {"origin": f"help_desk/{name}"})

    def _make_start(self) -> None:
        folder = self.folder / "start"
        texts = conversation_texts(self.world.demonstrations())
        tokenizer = build_tokenizer(texts, tiny_size(self.size).vocab_size, folder)
        model = build_tiny_llama(self.size, tokenizer, seed=self.seed)
        saved_folder(folder, lambda staged: write_model_folder(staged, model, tokenizer))

    def _train_sft(self) -> None:
        sft.train(
            sft.SFTConfig(
                data_path=str(self.folder / "world" / "demonstrations.jsonl"),
                model_name_or_path=str(self.folder / "start"),
                use_targets=False,
                num_train_epochs=2,
                per_device_train_batch_size=16,
                learning_rate=3e-3,
                weight_decay=0.05,
                **self._shared("sft"),
            )
        )

    def _label_pairs(self) -> None:
        """Two samples of the SFT policy a prompt, labelled by the world's noisy people."""
        folder = self.folder / "pairs"
        sampled = self._generate("sft", "pair_prompts", folder / "sampled.jsonl", count=2)
        rng = random.Random(f"labels/{self.seed}")
        pairs = [
            self.world.label_pair(s, rng)
            for s in read_candidate_sets(sampled)
            if len({c.response for c in s.candidates}) == 2
        ]
        write_candidate_sets(folder / "on_policy_pairs.jsonl", pairs, {"labelled": len(pairs)})

    def _train_reward(self) -> None:
        files = [
            self.folder / "world" / "static_pairs.jsonl",
            self.folder / "pairs" / "on_policy_pairs.jsonl",
        ]
        reward.train(
            reward.RewardConfig(
                data_path=",".join(str(path) for path in files),
                validation_datasets=str(self.folder / "world" / "held_out_pairs.jsonl"),
                model_name_or_path=str(self.folder / "sft" / "policy"),
                num_train_epochs=1,
                per_device_train_batch_size=16,
                learning_rate=1e-3,
                regularization=1e-3,
                normalizer_type="RunningMeanStd",
                **self._shared("reward"),
            )
        )

    def candidates(self, round_number: int, policy: str) -> None:
        """Sample a stage's policy on the alignment prompts, and score what it wrote."""
        folder = self.folder / f"round-{round_number}"
        raw = self._generate(policy, "prompts", folder / "candidates.jsonl", round=round_number)
        score_file(
            ScoreConfig(
                input_file=str(raw),
                output_file=str(folder / "train_data.json"),
                scorer=str(self.folder / "reward" / "reward_model"),
            )
        )

    # What stages share.

    def _shared(self, name: str) -> dict[str, Any]:
        """Settings of every training here; one that was stopped goes on."""
        folder = self.folder / name
        return {
            "output_dir": str(folder),
            "resume_from_checkpoint": settings_file(folder) is not None,
            "chat_format": "hh",
            "model_max_length": MAX_LENGTH,
            "min_learning_rate_ratio": 0.1,
            "warmup_ratio": 0.05,
            "group_by_length": True,
            "logging_steps": 10,
            "save_total_limit": 1,
            "seed": 1000 + self.seed,
        }

    def train_rank(
        self, name: str, data: str, start: str, weight: float, epochs: float | None = None
    ) -> None:
        """One round of offline ranking on scored candidates; weight 0 = on the best alone."""
        rank.train(
            rank.RankConfig(
                data_path=str(self.folder / data / "train_data.json"),
                model_name_or_path=str(self.folder / start / "policy"),
                objective_settings=RRHFSettings(rrhf_weight=weight, sft_reduction="response"),
                num_train_epochs=self.recipe.rrhf_epochs if epochs is None else epochs,
                per_device_train_batch_size=8,
                learning_rate=self.recipe.rrhf_learning_rate,
                **self._shared(name),
            )
        )

    def train_online(self, name: str, method: str, points: int = 0) -> None:
        """From the SFT policy, on what the policy itself writes (`help_desk_online`)."""
        shared = self._shared(name) | {"max_new_tokens": MAX_NEW_TOKENS, "group_by_length": False}
        files = {
            "model_name_or_path": str(self.folder / "sft" / "policy"),
            "train_datasets": str(self.folder / "world" / "prompts.jsonl"),
            "reward_model_name_or_path": str(self.folder / "reward" / "reward_model"),
        }
        ppo.train(online_config(method, self.size, shared, files, points))

    def _generate(
        self, policy: str, prompts: str, target: Path, count: int | None = None, round: int = 0
    ) -> Path:
        return generate_file(
            GenerateConfig(
                model_name_or_path=str(self.folder / policy / "policy"),
                prompts=str(self.folder / "world" / f"{prompts}.jsonl"),
                output_file=str(target),
                num_return_sequences=count or self.recipe.samples_per_prompt,
                max_new_tokens=MAX_NEW_TOKENS,
                chat_format="hh",
                per_device_prompt_batch_size=32,
                round=round,
                seed=self.seed,
                policy=policy,
            )
        )

    def engine(self, policy: str) -> LocalEngine:
        """The policy of a stage, or of a folder below the seed's, ready to write responses."""
        folder = self.folder / policy
        if (folder / "policy").is_dir():
            folder /= "policy"
        codec = ChatCodec(load_tokenizer(folder), "hh")
        return LocalEngine(load_causal_lm(folder), codec, max_batch_rows=128)


def finish(study: HelpDeskStages) -> None:
    """The seed's manifest, last."""
    write_manifest(
        study.folder,
        {
            "status": COMPLETE,
            "seed": study.seed,
            "size": study.size,
            "seconds": study.seconds,
        },
    )
