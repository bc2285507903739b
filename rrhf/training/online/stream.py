"""Yields batches of experience to the training loop: a rollout, passes over it, the next rollout.

Nothing is prefetched: a rollout begins only when the loop asks for the step after the last step of
the previous rollout. A checkpoint can therefore follow any step; it holds the current experience,
the position in the experience, the KL coefficient and the normaliser. A signal during a rollout
leaves all of these unchanged: the state before the rollout is saved, and a resumed run repeats the
rollout.

The prompts of a rollout depend on the seed and the rollout's number, and the order of a pass also
on the number of the pass. Every rollout is divided into the same number of minibatches, whether or
not responses were left out. A minibatch is divided over ranks and micro-batches as in
`rrhf.training.core.streams`, with the responses to one prompt next to each other, so that layouts
that share prompts compute each prompt once.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rrhf.algorithms.kl import KLController
from rrhf.algorithms.normalizers import Normalizer, normalizer_from_state
from rrhf.data.collate import EncodedSet, TokenBatch
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.training.core.phases import as_metrics
from rrhf.training.core.streams import StepCut
from rrhf.training.core.token_batches import PADDED, Size, tokens_of, warn_of_lone
from rrhf.training.online.experience import build_experience, pack, unpack
from rrhf.training.online.listeners import MadeRollout, RolloutListener
from rrhf.training.online.methods import METHODS
from rrhf.training.online.ppo_checks import check_horizon
from rrhf.training.online.ppo_config import PPOConfig
from rrhf.training.online.rollout import RolloutWriter

logger = logging.getLogger(__name__)

_SEED_STEP = 1_000_003


class PPOStream:
    """Yields micro-batches of experience of the current policy.

    Args:
        prompts: the prompts that fit.
        writer: makes the rollouts.
        config: the settings: sizes and number of passes.
        controller: adapts the KL coefficient.
        normalizer: normalises scores; None = do not normalise.
        cut: how each step is divided over ranks and micro-batches.
        listeners: called with each rollout.

    Attributes:
        total_steps: optimiser steps; decreases if a rollout is cut short and the run ends after a
            number of rollouts.
        counts: numbers of responses sampled and left out since the start of the run.
        prompts_per_rollout: number of prompts that a rollout answers.
        rollout_metrics: metrics of the current rollout.
    """

    def __init__(
        self,
        prompts: Sequence[CandidateSet],
        writer: RolloutWriter,
        config: PPOConfig,
        controller: KLController,
        normalizer: Normalizer | None,
        cut: StepCut,
        listeners: Sequence[RolloutListener] = (),
    ) -> None:
        self._prompts, self._writer, self._config = prompts, writer, config
        self._controller, self.normalizer = controller, normalizer
        self._cut, self._listeners = cut, listeners
        self.global_batch_size = cut.global_batch_size
        ranks = METHODS[config.method].ranks
        size = config.prompts_per_rollout if ranks else config.rollout_size
        self._minibatches = math.ceil(size / self.global_batch_size)
        self.prompts_per_rollout = config.prompts_per_rollout
        if config.refresh_steps:
            self._minibatches = config.refresh_steps // config.ppo_epochs
            rows = self._minibatches * cut.global_batch_size
            self.prompts_per_rollout = _prompts_of(config, rows)
        self.steps_per_rollout = self._minibatches * config.ppo_epochs
        self._ends_by_steps = config.max_steps > 0
        rollouts = config.num_rollouts
        if rollouts <= 0:
            asked = config.num_train_epochs * len(prompts)
            rollouts = max(math.ceil(asked / self.prompts_per_rollout), 1)
        self.total_steps = (
            config.max_steps if self._ends_by_steps else rollouts * self.steps_per_rollout
        )
        self.counts: Counter[str] = Counter()
        self._step = 0
        self._number = -1  # number of the current rollout
        self._place = self.steps_per_rollout  # steps done in the current rollout
        self._experience: list[EncodedSet] = []
        self._sizes: list[Size] = []
        self._has_warned = self._has_told = False
        self.rollout_metrics: dict[str, float] = {}
        self._has_news = False

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        while self._step < self.total_steps:
            if not self.steps_left_in_rollout:
                self._begin_rollout()
            batches = self._micro_batches(self._minibatch())
            self._step += 1
            self._place += 1
            yield batches

    @property
    def rollout_number(self) -> int:
        """Number of the current rollout, from 0; -1 before the first."""
        return self._number

    @property
    def steps_left_in_rollout(self) -> int:
        """Steps left in the passes over the current rollout."""
        return self.steps_per_rollout - self._place

    def skip_rest_of_rollout(self) -> None:
        """Skip the remaining steps of the current rollout."""
        if not self._ends_by_steps:
            self.total_steps -= self.steps_left_in_rollout
        self._place = self.steps_per_rollout

    def take_news(self) -> dict[str, float]:
        """Return the log row of a new rollout, only once; empty until the next rollout."""
        if not self._has_news:
            return {}
        self._has_news = False
        return {"rollout": float(self._number), **self.rollout_metrics}

    def state_dict(self) -> dict[str, Any]:
        """Return the position, the adapted values, and the settings that must not change on
        resuming."""
        normalizer = self.normalizer
        return {
            **self._fixed(),
            "step": self._step,
            "total_steps": self.total_steps,
            "rollout": self._number,
            "place": self._place,
            "rollout_metrics": self.rollout_metrics,
            "counts": dict(self.counts),
            "max_tokens_per_batch": self._cut.max_tokens,
            "kl_controller": self._controller.state_dict(),
            "normalizer": None if normalizer is None else normalizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the saved step.

        Raises:
            UserError: the prompts, or a setting on which the position depends, differ.
        """
        for name, mine in self._fixed().items():
            if state[name] != mine:
                raise UserError(
                    f"resume: {name} was {state[name]} in the checkpoint and is {mine} now; "
                    "resume with the value of the checkpoint"
                )
        self._step, self.total_steps = int(state["step"]), int(state["total_steps"])
        self._number, self._place = int(state["rollout"]), int(state["place"])
        self.rollout_metrics = dict(state["rollout_metrics"])
        self.counts = Counter(state["counts"])
        self._controller.load_state_dict(state["kl_controller"])
        if state["normalizer"] is not None:
            self.normalizer = normalizer_from_state(state["normalizer"])

    def tensors(self) -> dict[str, Tensor]:
        """Return the current experience as tensors; empty if no steps are left in the rollout."""
        return pack(self._experience) if self.steps_left_in_rollout else {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the experience."""
        self._take(unpack(tensors) if tensors else [])

    @property
    def steps_done(self) -> int:
        """Optimiser steps yielded so far."""
        return self._step

    def prompts_of(self, number: int) -> list[CandidateSet]:
        """Return the prompts of a rollout: the next ones in passes over all prompts; each pass is
        shuffled anew."""
        count = self.prompts_per_rollout
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
            "rollout_size": self.prompts_per_rollout * config.num_return_sequences,
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
        self._number, self._place = number, 0  # from here on no signal can interrupt the rollout
        experience = build_experience(
            rollout.rows, self._config, self._controller.coefficient, self.normalizer
        )
        self._controller.update(experience.kl, experience.num_responses)
        self._take(experience.sets)
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
            **rollout.measures,
        }
        made = MadeRollout(
            self._step, number, prompts, rollout.rows, experience, self.rollout_metrics
        )
        for listener in self._listeners:
            listener.see_rollout(made)

    def _take(self, experience: list[EncodedSet]) -> None:
        numbers: dict[tuple[int, ...], int] = {}
        self._experience = experience
        self._sizes = [
            Size.of(one, numbers.setdefault(tuple(one.prompt_ids), len(numbers)))
            for one in experience
        ]
        if self._cut.budget is not None and not self._has_warned:
            what = f"samples of rollout {self._number} (with their prompts)"
            self._has_warned = warn_of_lone(self._sizes, self._cut.budget, what)

    def _minibatch(self) -> list[int]:
        """Return the indices of the next step's sets: the next equal part of the shuffled pass.

        Sets of the same prompt are put next to each other, in the order in which prompts first
        occur.
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
        sizes = self._sizes
        if self._cut.budget is not None and not self._has_told:
            self._has_told = True
            told = self._cut.describe([sizes[i] for i in indices])
            logger.info("token batches: %s in the first step", told)

        def filler() -> int:
            return min(range(len(sizes)), key=lambda i: tokens_of([sizes[i]], PADDED))

        return self._cut.batches(self._experience, indices, lambda i: sizes[i], filler)

    def _permutation(self, count: int, number: int, step: int = 1) -> list[int]:
        seed = (self._config.seed * _SEED_STEP + number) * 11 + step
        order: list[int] = torch.randperm(
            count, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        return order


def _prompts_of(config: PPOConfig, rows: int) -> int:
    """Return how many prompts fill the batches of the steps until the sampler is refreshed.

    Args:
        config: the settings, with `refresh_steps`.
        rows: number of prompts (if the method ranks) or responses in all these batches.

    Raises:
        UserError: the batches do not hold all responses to each prompt, or the KL coefficient
            cannot be adjusted after so many responses.
    """
    samples = 1 if METHODS[config.method].ranks else config.num_return_sequences
    if rows % samples:
        raise UserError(
            f"--refresh_steps {config.refresh_steps}: its batches hold {rows} responses, which "
            f"must be a multiple of --num_return_sequences {samples}; change "
            "--per_device_train_batch_size or --gradient_accumulation_steps"
        )
    prompts = rows // samples
    check_horizon(config, prompts * config.num_return_sequences)
    return prompts
