"""One seed of the demonstration, stage by stage: each a folder, made once, taken up after a kill.

    world/ -> start/ -> sft/ -> reward/ -> round-1/ (candidates) -> best-of-n/ and rrhf/
                                           round-2/ (candidates of rrhf/) -> rrhf-2/ -> evaluation/

Every stage is the same call that a user's command makes, on the same hand-overs; what is particular
to the embedded world are its settings (`Recipe`), chosen so that a model of 0.4M weights shows what
RRHF does within minutes on one core.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rrhf.data.candidate_files import read_candidate_sets, write_candidate_sets
from rrhf.data.chat_format import ChatCodec
from rrhf.errors import AlreadyFinished
from rrhf.evaluation.evaluator import Evaluator
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.evaluation.results import load_row, save_row
from rrhf.files import COMPLETE, read_manifest, write_json, write_manifest
from rrhf.generation.engine import SamplingParams
from rrhf.generation.local import LocalEngine
from rrhf.generation.stage import GenerateConfig, generate_file
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.models.saving import write_model_folder
from rrhf.scoring.build import build_scorer
from rrhf.scoring.stage import ScoreConfig, score_file
from rrhf.training import rank, reward, sft
from rrhf.training.checkpoint import saved_folder
from rrhf.worlds.help_desk import HelpDesk
from rrhf.worlds.tiny_model import (
    build_tiny_llama,
    build_tokenizer,
    conversation_texts,
    tiny_size,
)

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 56
MAX_LENGTH = 192
NUM_STAGES = 11


@dataclass(frozen=True)
class Recipe:
    """Settings of the study; the defaults are the demo's.

    Attributes:
        samples_per_prompt: N of the candidates, and of best-of-N.
        rrhf_weight: of the rank term beside a token-mean SFT term.
        rrhf_learning_rate, rrhf_epochs: of the first round; the second makes one pass.
        test_samples: sampled responses a test prompt.
    """

    samples_per_prompt: int = 4
    rrhf_weight: float = 0.1
    rrhf_learning_rate: float = 5e-4
    rrhf_epochs: float = 2.0
    test_samples: int = 2


class HelpDeskStudy:
    """Attributes:
    folder: of this seed.
    world: the embedded world.
    seconds: what each stage took, by name; of an earlier call where it was done then.
    """

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

    def run(self) -> list[dict[str, Any]]:
        """All stages; returns the rows of the table."""
        self._stage("world", "write the world's texts", self._write_world)
        self._stage("start", "make tokenizer and an untrained Llama", self._make_start)
        self._stage("sft", "fine-tune on demonstrations (SFT)", self._train_sft)
        self._stage("pairs", "sample and label pairs for the reward model", self._label_pairs)
        self._stage("reward", "train the reward model", self._train_reward)
        self._stage("round-1", "sample and score candidates", lambda: self._candidates(1, "sft"))
        self._stage("best-of-n", "train on the best alone (rank weight 0)", self._train_best_of_n)
        self._stage("rrhf", "train by RRHF", self._train_rrhf)
        self._stage("round-2", "sample and score again", lambda: self._candidates(2, "rrhf"))
        self._stage("rrhf-2", "train by RRHF, round 2", self._train_round_2)
        self._stage("evaluation", "evaluate on held-out prompts", self._evaluate)
        return [load_row(path) for path in self._row_files()]

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

    def _candidates(self, round_number: int, policy: str) -> None:
        folder = self.folder / f"round-{round_number}"
        raw = self._generate(policy, "prompts", folder / "candidates.jsonl", round=round_number)
        score_file(
            ScoreConfig(
                input_file=str(raw),
                output_file=str(folder / "train_data.json"),
                scorer=str(self.folder / "reward" / "reward_model"),
            )
        )

    def _train_best_of_n(self) -> None:
        self._train_rank("best-of-n", "round-1", "sft", weight=0.0)

    def _train_rrhf(self) -> None:
        self._train_rank("rrhf", "round-1", "sft", self.recipe.rrhf_weight)

    def _train_round_2(self) -> None:
        self._train_rank("rrhf-2", "round-2", "rrhf", self.recipe.rrhf_weight, epochs=1.0)

    def _evaluate(self) -> None:
        """Rows share prompts, scorer, gold, reference and baseline; each is saved as it comes."""
        engines = {name: self._engine(name) for name in ("sft", "best-of-n", "rrhf", "rrhf-2")}
        reference = engines["sft"]
        evaluator = Evaluator(
            self.world.test_prompts(),
            scorer=build_scorer(str(self.folder / "reward" / "reward_model")),
            gold=self.world,
            reference=LikelihoodReader(reference.model, reference.codec, "sft"),
            human=self.world.references("GOOD"),
            pairs=self.world.held_out_pairs(),
        )
        sampled = SamplingParams(
            num_return_sequences=self.recipe.test_samples, max_new_tokens=MAX_NEW_TOKENS, seed=2
        )
        greedy = replace(sampled, do_sample=False, num_return_sequences=1)
        best_of = self.recipe.samples_per_prompt
        opponent = evaluator.sample("SFT", reference, replace(sampled, seed=1))
        evaluator.set_baseline("SFT", opponent)
        plan: list[tuple[str, str, SamplingParams, int]] = [
            ("SFT", "sft", sampled, 1),
            ("SFT greedy", "sft", greedy, 1),
            (f"best of {best_of}", "sft", sampled, best_of),
            (f"best-of-{best_of} fine-tuning", "best-of-n", sampled, 1),
            ("RRHF", "rrhf", sampled, 1),
            ("RRHF greedy", "rrhf", greedy, 1),
            ("RRHF round 2", "rrhf-2", sampled, 1),
            ("RRHF round 2 greedy", "rrhf-2", greedy, 1),
        ]
        folder = self.folder / "evaluation"
        files = []
        for name, policy, params, best in plan:
            row = evaluator.row(name, engines[policy], params, best_of=best)
            row["training"] = self._training_cost(policy)
            files.append(save_row(row, evaluator.samples[name], folder).name)
        write_json(folder / "rows.json", files)

    # What stages share.

    def _stage(self, name: str, what: str, do: Callable[[], None]) -> None:
        folder = self.folder / name
        done = folder / "stage.json"
        self._num_begun += 1
        what = f"[{self._num_begun}/{NUM_STAGES}] {what}"
        if done.is_file():
            self.seconds[name] = float(json.loads(done.read_text())["seconds"])
            self.say(f"{what}: done before")
            return
        self.say(f"{what} ...")
        started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        # A kill between the end of a training and the note below leaves the training finished.
        with suppress(AlreadyFinished):
            do()
        self.seconds[name] = round(time.monotonic() - started, 1)
        write_json(done, {"stage": name, "seconds": self.seconds[name]})
        self.say(f"{what}: {self.seconds[name]:.0f} s")

    def _shared(self, name: str) -> dict[str, Any]:
        """Settings of every training here; one that was stopped goes on."""
        folder = self.folder / name
        return {
            "output_dir": str(folder),
            "resume_from_checkpoint": (folder / "config.json").is_file(),
            "chat_format": "hh",
            "model_max_length": MAX_LENGTH,
            "min_learning_rate_ratio": 0.1,
            "warmup_ratio": 0.05,
            "group_by_length": True,
            "logging_steps": 10,
            "save_total_limit": 1,
            "seed": 1000 + self.seed,
        }

    def _train_rank(
        self, name: str, data: str, start: str, weight: float, epochs: float | None = None
    ) -> None:
        rank.train(
            rank.RankConfig(
                data_path=str(self.folder / data / "train_data.json"),
                model_name_or_path=str(self.folder / start / "policy"),
                rrhf_weight=weight,
                sft_reduction="response",
                num_train_epochs=self.recipe.rrhf_epochs if epochs is None else epochs,
                per_device_train_batch_size=8,
                learning_rate=self.recipe.rrhf_learning_rate,
                **self._shared(name),
            )
        )

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

    def _engine(self, policy: str) -> LocalEngine:
        folder = self.folder / policy / "policy"
        codec = ChatCodec(load_tokenizer(folder), "hh")
        return LocalEngine(load_causal_lm(folder), codec, max_batch_rows=128)

    def _training_cost(self, policy: str) -> dict[str, float]:
        """Seconds that a policy took after SFT and reward model, its candidates included."""
        stages = {
            "sft": (),
            "best-of-n": ("round-1", "best-of-n"),
            "rrhf": ("round-1", "rrhf"),
            "rrhf-2": ("round-1", "rrhf", "round-2", "rrhf-2"),
        }[policy]
        return {name: self.seconds[name] for name in stages}

    def _row_files(self) -> list[Path]:
        folder = self.folder / "evaluation"
        return [folder / name for name in json.loads((folder / "rows.json").read_text())]


def is_finished(folder: Path) -> bool:
    """Whether a seed's folder holds a whole study."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("status") == COMPLETE


def finish(study: HelpDeskStudy) -> None:
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
