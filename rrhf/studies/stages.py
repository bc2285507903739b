"""The stages of a study. Each stage writes one folder; finished stages are not run again.

    world/ -> start/ -> sft/ -> pairs/ -> reward/ -> round-1/ (candidates) -> rrhf/, best-of-n/
                                                     round-2/ (candidates of rrhf/) -> rrhf-2/ ...
                                                     ppo/, rloo/, ... (online, from sft/)

Every stage makes the same call as the command that a user would run, on the same files. The world
provides the data and the settings (`rrhf.worlds.recipe`). The study (a subclass) decides which
stages to run and what to measure.
"""

from __future__ import annotations

import copy
import json
import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Self

from rrhf.data.candidate_files import read_candidate_sets, write_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import AlreadyFinished, UserError
from rrhf.files import write_json
from rrhf.generation.local.engine import LocalEngine
from rrhf.generation.stage import GenerateConfig, generate_file
from rrhf.manifests import COMPLETE, read_manifest, write_manifest
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.models.saving import write_model_folder
from rrhf.runs import settings_file
from rrhf.scoring.stage import ScoreConfig, score_file
from rrhf.staged_folders import saved_folder
from rrhf.studies.change import Change, with_noise
from rrhf.studies.method_table import BY_STAGE, METHODS, Method, rounds_policy
from rrhf.studies.online_settings import online_config
from rrhf.training.methods import rank, reward, sft
from rrhf.training.methods.objectives import OBJECTIVES
from rrhf.training.online import ppo
from rrhf.worlds import make_world
from rrhf.worlds.recipe import TinySize
from rrhf.worlds.tiny_model import build_tiny_llama, build_tokenizer, conversation_texts

logger = logging.getLogger(__name__)

STAGE_FILE = ".stage.json"
"""Marks a finished stage; hidden, since a stage's folder may be a sealed model folder."""
_EARLIER_STAGE_FILE = "stage.json"
_FIRST_STAGES = ("world", "start", "sft", "pairs", "reward")


class Stages:
    """Runs the stages of a study for one seed, and skips those that an earlier call finished.

    Attributes:
        folder: the folder of this seed.
        branch: the folder inside `folder` for stages that are not shared; "" = `folder` itself.
        change: how this branch differs.
        world: the world at this size and seed.
        recipe: the world's settings for the stages.
        seconds: stage -> its duration, including stages finished in an earlier call.
        num_stages: number of stages, for the lines of progress.
    """

    num_stages = 5

    def __init__(
        self,
        folder: Path,
        world: str,
        size: str = "full",
        seed: int = 0,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self.folder = folder
        self.branch = ""
        self.change = Change()
        self._shared_stages = {*_FIRST_STAGES, "round-1"}
        self.size = size
        self.seed = seed
        self.world = make_world(world, size=size, seed=seed)
        self.recipe = self.world.recipe()
        self.say = say
        self.seconds: dict[str, float] = {}
        self._begun = count(1)

    def place(self, stage: str) -> Path:
        """Return the folder of a stage: in the folder of the seed if it is shared, else in the
        branch."""
        return self.folder / ("" if stage in self._shared_stages else self.branch) / stage

    def branched(self, branch: str, change: Change) -> Self:
        """Return a copy of this study that shares the first stages and has its own later stages.

        Args:
            branch: the folder for the stages of the copy, inside the folder of the seed.
            change: how the copy differs.
        """
        other = copy.copy(self)
        other.branch, other.change, other.seconds = branch, change, {}
        other._shared_stages = (self._shared_stages | {change.writer}) - {*change.own_stages}
        return other

    def prepare(self) -> None:
        """Train the SFT policy and the reward model, from which every method starts.

        Raises:
            UserError: the folder holds a study of another world.
        """
        written = read_manifest(self.place("world") / "demonstrations.jsonl") or {}
        origin = str(written.get("origin", self.world.name)).partition("/")[0]
        if origin != self.world.name:
            raise UserError(
                f"{self.folder}: holds a study of the world {origin}, not of {self.world.name}; "
                "choose another --output_dir"
            )
        self.stage("world", "write the world's texts", self._write_world)
        self._base("", self.recipe.model)
        self.stage("pairs", "sample and label pairs for the reward model", self._label_pairs)
        self.stage("reward", "train the reward model", self._train_reward)

    def _base(self, prefix: str, shape: TinySize) -> None:
        """Train an SFT policy of the given shape, in the stages PREFIXstart and PREFIXsft."""
        start, tuned = f"{prefix}start", f"{prefix}sft"
        make = partial(self._make_start, start, shape)
        self.stage(start, "make tokenizer and an untrained Llama", make)
        self.stage(
            tuned, "fine-tune on demonstrations (SFT)", partial(self._train_sft, tuned, start)
        )

    def reward_stages(self) -> None:
        """Train the reward model of a branch that does not share the study's reward model."""
        if "reward" not in self.change.own_stages:
            return
        base = "sft"
        if size := self.change.reward_size:
            self._base("reward-", replace(self.recipe.model, hidden_size=size))
            base = "reward-sft"
        self.stage("reward", "train the reward model", partial(self._train_reward, base))

    def stage(self, name: str, what: str, do: Callable[[], object]) -> None:
        """Run a stage unless it is already finished, and record its duration."""
        folder = self.place(name)
        done = folder / STAGE_FILE
        what = f"[{next(self._begun)}/{self.num_stages}] {what}"
        if (earlier := folder / _EARLIER_STAGE_FILE).is_file():
            earlier.rename(done)
        if done.is_file():
            self.seconds[name] = float(json.loads(done.read_text())["seconds"])
            self.say(f"{what}: done before")
            return
        self.say(f"{what} ...")
        started, cpu_started = time.monotonic(), time.process_time()
        folder.mkdir(parents=True, exist_ok=True)
        # After a kill between the end of a training and `write_json` below, the run is complete.
        with suppress(AlreadyFinished):
            do()
        self.seconds[name] = round(time.monotonic() - started, 1)
        cpu = round(time.process_time() - cpu_started, 1)
        write_json(done, {"stage": name, "seconds": self.seconds[name], "cpu_seconds": cpu})
        self.say(f"{what}: {self.seconds[name]:.0f} s")

    # Stages.

    def _write_world(self) -> None:
        world, folder = self.world, self.place("world")
        for name, sets in (
            ("demonstrations", world.demonstrations()),
            ("static_pairs", world.pairs("train")),
            ("pair_prompts", world.prompts("pairs")),
            ("prompts", world.prompts("train")),
            ("test_prompts", world.prompts("test")),
            ("held_out_pairs", world.pairs("held_out")),
        ):
            write_candidate_sets(folder / f"{name}.jsonl", sets, {"origin": f"{world.name}/{name}"})

    def _make_start(self, name: str, shape: TinySize) -> None:
        folder = self.place(name)
        texts = conversation_texts(self.world.demonstrations())
        tokenizer = build_tokenizer(texts, shape.vocab_size, folder)
        model = build_tiny_llama(shape, tokenizer, seed=self.seed)
        saved_folder(folder, lambda staged: write_model_folder(staged, model, tokenizer))

    def _train_sft(self, name: str, start: str) -> None:
        sft.train(
            sft.SFTConfig(
                data_path=str(self.place("world") / "demonstrations.jsonl"),
                model_name_or_path=str(self.place(start)),
                use_targets=False,
                **self._shared(name, self.recipe.sft),
            )
        )

    def _label_pairs(self) -> None:
        """Sample two responses of the SFT policy to each prompt, and label them with the world's
        noise."""
        folder = self.place("pairs")
        sampled = self._generate("sft", "pair_prompts", folder / "sampled.jsonl", samples=2)
        rng = random.Random(f"labels/{self.seed}")
        pairs = [
            self.world.label_pair(s, rng)
            for s in read_candidate_sets(sampled)
            if len(set(s.responses)) == 2
        ]
        write_candidate_sets(folder / "on_policy_pairs.jsonl", pairs, {"labelled": len(pairs)})

    def _train_reward(self, base: str = "sft") -> None:
        files = [
            self.place("world") / "static_pairs.jsonl",
            self.place("pairs") / "on_policy_pairs.jsonl",
        ]
        share = "" if self.change.pairs_share == 1 else f":{self.change.pairs_share}"
        reward.train(
            reward.RewardConfig(
                data_path=",".join(f"{path}{share}" for path in files),
                validation_datasets=str(self.place("world") / "held_out_pairs.jsonl"),
                model_name_or_path=str(self.place(base) / "policy"),
                **self._shared("reward", self.recipe.reward),
            )
        )

    def method_stage(self, name: str, points: int = 0) -> None:
        """Run one stage of a method; SFT policy and reward model must be ready.

        Args:
            name: "round-N": sample and score candidates with the policy of the previous round;
                "rrhf" or "rrhf-N": train on these candidates by RRHF; "best-of-n": train on the
                best of round 1 alone; or the stage of an online method.
            points: for an online method, the number of policies to save during training.
        """
        number = int(name.rpartition("-")[2]) if re.search(r"-\d+$", name) else 1
        before = rounds_policy(number - 1)
        method = BY_STAGE.get(name, METHODS["rrhf"])
        if method.online:
            what = f"train online by {name}"
            do = partial(self._train_online, name, method, points)
        elif name.startswith("round-"):
            what = f"sample and score candidates (round {number})"
            do = partial(self._candidates, name, number, before)
        elif method.objective != "rrhf":
            what = f"train by {method.title}"
            do = partial(self._train_rank, name, method, 1)
        elif name == "best-of-n":
            what = "train on the best alone (rank weight 0)"
            do = partial(self._train_rank, name, method, 1)
        else:
            what = f"train by RRHF (round {number})"
            do = partial(self._train_rank, name, method, number)
        self.stage(name, what, do)

    def finish(self) -> None:
        """Write the manifest of the seed's folder; call it after everything else."""
        facts = {"seed": self.seed, "size": self.size, "seconds": self.seconds}
        write_manifest(self.folder, {"status": COMPLETE, **facts})

    def _candidates(self, name: str, number: int, policy: str) -> None:
        """Sample responses to the alignment prompts with a stage's policy, and score them."""
        folder = self.place(name)
        first, change = number == 1, self.change
        raw = self._generate(
            change.writer if first else policy,
            "prompts",
            folder / "candidates.jsonl",
            samples=change.samples,
            round=number,
            temperature=change.temperature if first else 1.0,
        )
        scored = folder / "train_data.json"
        noisy = first and change.score_noise > 0
        score_file(
            ScoreConfig(
                input_file=str(raw),
                output_file=str(folder / "scored.jsonl" if noisy else scored),
                scorer=str(self.place("reward") / "reward_model"),
            )
        )
        if noisy:
            sets = [*read_candidate_sets(folder / "scored.jsonl")]
            rng = random.Random(f"score noise/{self.seed}")
            write_candidate_sets(scored, with_noise(sets, change.score_noise, rng))

    # Used by several stages.

    def _shared(self, name: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that all trainings share, and those of this stage. They let a
        repeated call resume a stopped training."""
        folder = self.place(name)
        return {
            "output_dir": str(folder),
            "resume_from_checkpoint": settings_file(folder) is not None,
            "chat_format": self.recipe.chat_format,
            "logging_steps": 10,
            "save_total_limit": 1,
            "seed": 1000 + self.seed,
            **self.recipe.training,
            **own,
        }

    def _train_rank(self, name: str, method: Method, number: int) -> None:
        """Train on the candidates of round `number`, starting from the policy of the round before.

        The settings that define the method replace the study's settings for the stage, which in
        turn replace the recipe's.
        """
        recipe = self.recipe
        objective = OBJECTIVES[method.objective].settings
        of_objective = {field.name for field in fields(objective)} if objective else set()
        values = {
            **(recipe.rrhf if method.objective == "rrhf" else {}),
            **recipe.rank,
            **(recipe.later_rounds if number > 1 else {}),
            **self.change.settings.get("later_rounds" if number > 1 else name, {}),
            **method.settings,
        }
        own = {key: value for key, value in values.items() if key not in of_objective}
        chosen = {key: value for key, value in values.items() if key in of_objective}
        rank.train(
            rank.RankConfig(
                data_path=str(self.place(f"round-{number}") / "train_data.json"),
                model_name_or_path=str(self.place(rounds_policy(number - 1)) / "policy"),
                objective=method.objective,
                objective_settings=objective(**chosen) if objective else None,
                **self._shared(name, own),
            )
        )

    def _train_online(self, name: str, method: Method, points: int) -> None:
        """Train the SFT policy on its own responses."""
        shared = self._shared(
            name, {"max_new_tokens": self.recipe.max_new_tokens, "group_by_length": False}
        )
        files = {
            "model_name_or_path": str(self.place("sft") / "policy"),
            "train_datasets": str(self.place("world") / "prompts.jsonl"),
            "reward_model_name_or_path": str(self.place("reward") / "reward_model"),
        }
        own = {**self.change.settings.get(name, {}), **method.settings}
        recipe = self.recipe.online
        if self.change.samples:
            recipe = replace(recipe, samples_per_prompt=self.change.samples)
        ppo.train(online_config(method, recipe, own, {**shared, **files}, points))

    def _generate(
        self, policy: str, prompts: str, target: Path, samples: int = 0, **named: Any
    ) -> Path:
        return generate_file(
            GenerateConfig(
                model_name_or_path=str(self.place(policy) / "policy"),
                prompts=str(self.place("world") / f"{prompts}.jsonl"),
                output_file=str(target),
                num_return_sequences=samples or self.recipe.samples_per_prompt,
                max_new_tokens=self.recipe.max_new_tokens,
                chat_format=self.recipe.chat_format,
                per_device_prompt_batch_size=32,
                seed=self.seed,
                policy=policy,
                **named,
            )
        )

    def engine(self, policy: str) -> LocalEngine:
        """Build an engine that samples from the policy of a stage, or of a subfolder of the seed's
        folder."""
        folder = self.place(policy)
        if (folder / "policy").is_dir():
            folder /= "policy"
        codec = ChatCodec(load_tokenizer(folder), self.recipe.chat_format)
        return LocalEngine(load_causal_lm(folder), codec, max_batch_rows=128)
