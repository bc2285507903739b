"""The stream that the policy writes while it trains: rollout, passes over it, next rollout.

Nothing is prefetched past a step: a rollout begins when the loop asks for the step after the last
one of the rollout before. So a checkpoint may follow any step, and holds the current experience,
the place in it, the KL coefficient and the normaliser. A rollout that a signal cuts short has
changed none of that: what is saved then is the state before it, and resuming makes it again.

The prompts of a rollout follow from (seed, its number), the order of a pass from (seed, its
number, the pass). A rollout is cut into equally many minibatches, whether or not responses were
left out; a minibatch is cut over ranks and micro-batches as in `rrhf.training.core.streams`, with
the responses to one prompt side by side, since engines that share prompts then compute it once.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rrhf.algorithms.kl import KLController
from rrhf.algorithms.normalizers import Normalizer, normalizer_from_state
from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.training.core.parallel import Parallel
from rrhf.training.core.phases import as_metrics
from rrhf.training.core.token_batches import (
    PADDED,
    Size,
    TokenBudget,
    even_batches,
    micro_batches,
    tokens_of,
    told,
    warn_of_lone,
)
from rrhf.training.online.experience import build_experience, pack, unpack
from rrhf.training.online.methods import METHODS
from rrhf.training.online.no_learning import NoLearning
from rrhf.training.online.objective import PPOObjective
from rrhf.training.online.ppo_config import PPOConfig
from rrhf.training.online.rollout import RolloutWriter
from rrhf.training.online.sample_table import SampleTable

logger = logging.getLogger(__name__)

UPDATE_KL = "approximate_kl_k3"
_SEED_STEP = 1_000_003


class PPOStream:
    """Feeds the loop with experience of the live policy.

    Args:
        prompts: that fit.
        writer: of rollouts.
        config: sizes, passes, early stop.
        controller: of the KL coefficient.
        normalizer: of scores, or None.
        objective: is told which steps are the critic's alone, and asked for the largest ratio.
        pad_id: filler of the batches.
        parallel: ranks.
        samples: to show rollouts in.
        budget: cut each minibatch by tokens instead of by number.

    Attributes:
        total_steps: optimiser steps; falls where --target_kl cuts rollouts short and their number
            is what ends the run.
        counts: responses sampled and left out since the beginning.
        rollout_metrics: of the current rollout.
        rollouts_cut: rollouts whose last steps were skipped, in this process.
        steps_skipped: those steps.
        signs: that the run cannot learn.
    """

    def __init__(
        self,
        prompts: Sequence[CandidateSet],
        writer: RolloutWriter,
        config: PPOConfig,
        controller: KLController,
        normalizer: Normalizer | None,
        objective: PPOObjective | None,
        pad_id: int,
        parallel: Parallel,
        samples: SampleTable | None = None,
        budget: TokenBudget | None = None,
    ) -> None:
        self._samples, self._budget = samples, budget
        self._prompts, self._writer, self._config = prompts, writer, config
        self._controller, self.normalizer = controller, normalizer
        self._objective, self._pad_id, self._parallel = objective, pad_id, parallel
        self.global_batch_size = (
            config.per_device_train_batch_size
            * config.gradient_accumulation_steps
            * parallel.world_size
        )
        ranks = METHODS[config.method].ranks
        size = config.prompts_per_rollout if ranks else config.rollout_size
        self._minibatches = math.ceil(size / self.global_batch_size)
        self.steps_per_rollout = self._minibatches * config.ppo_epochs
        self._ends_by_steps = config.max_steps > 0
        rollouts = config.num_rollouts
        if rollouts <= 0:
            asked = config.num_train_epochs * len(prompts)
            rollouts = max(math.ceil(asked / config.prompts_per_rollout), 1)
        self.total_steps = (
            config.max_steps if self._ends_by_steps else rollouts * self.steps_per_rollout
        )
        self.counts: Counter[str] = Counter()
        self._step = 0
        self._number = -1  # of the current rollout
        self._place = self.steps_per_rollout  # steps done in it
        self._experience: list[EncodedSet] = []
        self._sizes: list[Size] = []
        self._has_warned = self._has_told = False
        self.rollout_metrics: dict[str, float] = {}
        self._has_news = False
        self._largest_ratio = 0.0
        self.signs = NoLearning(config)
        self.rollouts_cut = self.steps_skipped = 0

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        while self._step < self.total_steps:
            if self._place == self.steps_per_rollout:
                self._begin_rollout()
            batches = self._micro_batches(self._minibatch())
            if self._objective is not None:
                self._objective.policy_is_frozen = self._step < self._config.critic_warmup_steps
            self._step += 1
            self._place += 1
            yield batches

    def observe(self, metrics: dict[str, float]) -> None:
        """Go on to the next rollout where the policy has moved far enough on this one."""
        if self._objective is not None:
            self._largest_ratio = self._parallel.max(self._objective.take_largest_ratio())
        target = self._config.target_kl
        rest = self.steps_per_rollout - self._place
        if target and rest and metrics.get(UPDATE_KL, 0.0) > target:
            if not self.rollouts_cut:
                logger.info(
                    "rollout %d: its updates moved the policy by a KL of %.3g, above --target_kl "
                    "%.3g; the %d steps that it had left are skipped, as in every rollout from now "
                    "on that goes as far",
                    self._number,
                    metrics[UPDATE_KL],
                    target,
                    rest,
                )
            self.rollouts_cut += 1
            self.steps_skipped += rest
            self._place = self.steps_per_rollout
            if not self._ends_by_steps:
                self.total_steps -= rest

    def metrics(self) -> dict[str, float]:
        """Which rollout the step was trained on, and its largest ratio."""
        row = {"rollout": float(self._number)}
        if self._objective is not None:
            row["largest_ratio"] = self._largest_ratio
        return row

    def take_news(self) -> dict[str, float]:
        """The row of a rollout, once, before the first step that is trained on it."""
        if not self._has_news:
            return {}
        self._has_news = False
        return {"rollout": float(self._number), **self.rollout_metrics}

    def state_dict(self) -> dict[str, Any]:
        """The cursor, what was learnt, and what must not differ for them to mean the same."""
        normalizer = self.normalizer
        return {
            **self._fixed(),
            "step": self._step,
            "total_steps": self.total_steps,
            "rollout": self._number,
            "place": self._place,
            "rollout_metrics": self.rollout_metrics,
            "counts": dict(self.counts),
            "signs": self.signs.state_dict(),
            "max_tokens_per_batch": None if self._budget is None else self._budget.tokens,
            "kl_controller": self._controller.state_dict(),
            "normalizer": None if normalizer is None else normalizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the saved step.

        Raises:
            UserError: the prompts or a setting that the cursor depends on differ.
        """
        for name, mine in self._fixed().items():
            if state[name] != mine:
                raise UserError(
                    f"resume: {name} was {state[name]} in the checkpoint and is {mine} now; "
                    "start with what the checkpoint had"
                )
        self._step, self.total_steps = int(state["step"]), int(state["total_steps"])
        self._number, self._place = int(state["rollout"]), int(state["place"])
        self.rollout_metrics = dict(state["rollout_metrics"])
        self.counts = Counter(state["counts"])
        signs = state.get("signs", {"rollouts": self._number + 1})  # earlier versions kept none
        self.signs.load_state_dict(signs, self.rollout_metrics)
        self._controller.load_state_dict(state["kl_controller"])
        if state["normalizer"] is not None:
            self.normalizer = normalizer_from_state(state["normalizer"])

    def tensors(self) -> dict[str, Tensor]:
        """The current experience, as long as steps are left in it."""
        is_over = self._place == self.steps_per_rollout
        return {} if is_over else pack(self._experience)

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take the experience up again."""
        self._take(unpack(tensors) if tensors else [])

    @property
    def steps_done(self) -> int:
        """Optimiser steps that have been given out."""
        return self._step

    def prompts_of(self, number: int) -> list[CandidateSet]:
        """The prompts of a rollout: passes over all of them, each in an order of its own."""
        count = self._config.prompts_per_rollout
        orders: dict[int, list[int]] = {}
        chosen = []
        for place in range(number * count, (number + 1) * count):
            epoch, place_in_epoch = divmod(place, len(self._prompts))
            if epoch not in orders:
                orders[epoch] = self._permutation(len(self._prompts), epoch)
            chosen.append(self._prompts[orders[epoch][place_in_epoch]])
        return chosen

    def _fixed(self) -> dict[str, Any]:
        config = self._config
        return {
            "prompts": len(self._prompts),
            "method": config.method,
            "rollout_size": config.rollout_size,
            "num_return_sequences": config.num_return_sequences,
            "ppo_epochs": config.ppo_epochs,
            "global_batch_size": self.global_batch_size,
            "normalize_reward": config.normalize_reward,
            "adaptive_kl": config.adaptive_kl,
            "seed": config.seed,
        }

    def _begin_rollout(self) -> None:
        number = self._number + 1
        prompts = self.prompts_of(number)
        rollout = self._writer.write(prompts, number)
        self._number, self._place = number, 0  # from here on nothing can stop it half way
        experience = build_experience(
            rollout.rows, self._config, self._controller.coefficient, self.normalizer
        )
        self._controller.update(experience.kl, experience.num_responses)
        self._take(experience.sets)
        if self._samples is not None:
            self._samples.show_rollout(self._step, number, prompts, rollout.rows, experience)
        self.counts.update(rollout.counts)
        sampled = max(rollout.counts["sampled"], 1)
        self._has_news = True
        self.rollout_metrics = {
            **experience.metrics,
            **{
                f"{name}_fraction": rollout.counts[name] / sampled
                for name in ("empty", "unscored", "unfinished", "looped", "cut")
            },
            **as_metrics(rollout.spent),
        }
        self.signs.see(
            self.rollout_metrics, rollout.rows, self._step < self._config.critic_warmup_steps
        )

    def _take(self, experience: list[EncodedSet]) -> None:
        numbers: dict[tuple[int, ...], int] = {}
        self._experience = experience
        self._sizes = [
            Size.of(one, numbers.setdefault(tuple(one.prompt_ids), len(numbers)))
            for one in experience
        ]
        if self._budget is not None and not self._has_warned:
            what = f"samples of rollout {self._number} (with their prompts)"
            self._has_warned = warn_of_lone(self._sizes, self._budget, what)

    def _minibatch(self) -> list[int]:
        """Which sets the next step takes: even pieces of the pass's order, of one prompt together,
        in the order in which prompts first come.
        """
        epoch, place = divmod(self._place, self._minibatches)
        count = len(self._experience)
        order = self._permutation(count, self._number * self._config.ppo_epochs + epoch, step=7)
        first, last = (count * (place + i) // self._minibatches for i in (0, 1))
        prompts: dict[Any, list[int]] = {}
        for index in order[first:last]:
            prompts.setdefault(self._sizes[index].same_prompt, []).append(index)
        return [index for places in prompts.values() for index in places]

    def _micro_batches(self, indices: list[int]) -> list[TokenBatch]:
        world_size = self._parallel.world_size
        if self._budget is None:
            cut = even_batches(len(indices), self._config.per_device_train_batch_size, world_size)
        else:
            sizes = [self._sizes[i] for i in indices]
            cut = micro_batches(sizes, self._budget, world_size)
            if not self._has_told:
                self._has_told = True
                logger.info("token batches: %s in the first step", told(cut, sizes, self._budget))
        batches = []
        for places in cut[self._parallel.rank]:
            mine = [self._experience[indices[place]] for place in places]
            if not mine:
                mine = [replace(self._filler, weight=0.0)]
            batches.append(collate(mine, self._pad_id))
        return batches

    @property
    def _filler(self) -> EncodedSet:
        sizes = self._sizes
        return self._experience[min(range(len(sizes)), key=lambda i: tokens_of([sizes[i]], PADDED))]

    def _permutation(self, count: int, number: int, step: int = 1) -> list[int]:
        seed = (self._config.seed * _SEED_STEP + number) * 11 + step
        order: list[int] = torch.randperm(
            count, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        return order
