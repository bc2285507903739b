"""The training loop of all trainers: optimiser steps, evaluations, checkpoints and logging.

An `Objective` defines the loss, and an `UpdateStream` provides the data; SFT, reward, rank and PPO
training differ only in these two. `rrhf.training.core.update` does the optimiser steps. Anything
else that happens between steps is a `Hook`.

A checkpoint can be written after any step. On SIGTERM or SIGINT, the run writes a checkpoint after
the current step and ends; a rollout in progress is dropped and repeated after resuming.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from rrhf.data.collate import TokenBatch
from rrhf.errors import NonFiniteError, Resumable, StoppedBySignal, UserError
from rrhf.models.finite import first_non_finite
from rrhf.progress import Progress, figures
from rrhf.runs import describe_changes
from rrhf.signals import caught_signals
from rrhf.training.core.best import BestModel
from rrhf.training.core.checkpoint import Checkpointer
from rrhf.training.core.held_out_figures import held_out_figures
from rrhf.training.core.hooks import Hook, Hooks
from rrhf.training.core.kept_models import KeptModels
from rrhf.training.core.model_folders import ModelFolders
from rrhf.training.core.offload import TRAIN
from rrhf.training.core.opened_run import OpenedRun
from rrhf.training.core.optim import (
    apply_settings,
    build_optimizer,
    build_scheduler,
    follow_schedule,
    optimizer_settings,
)
from rrhf.training.core.phases import as_metrics
from rrhf.training.core.streams import LiveStream, UpdateStream
from rrhf.training.core.tracking import Tracker, build_tracker
from rrhf.training.core.update import Objective, Update

logger = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], dict[str, float]]
"""Measures the prepared model on held-out data; called on every rank."""

SHOWN = {
    "loss": "loss {:.4g}",
    "accuracy": "accuracy {:.3f}",
    "ranking_accuracy": "accuracy {:.3f}",
    "score": "score {:.3f}",
    "kl": "KL {:.3f}",
    "tokens_per_second": "{:.0f} tokens/s",
}
"""Formats of the metrics that progress lines show for a step."""


@dataclass(frozen=True)
class TrainingOutcome:
    """The result of a finished training.

    Attributes:
        model: the trained module, unwrapped.
        steps: optimiser steps of the whole run, including earlier parts of a resumed run.
        seconds: wall time of this process, without earlier parts of a resumed run.
        tokens: response and prompt tokens that went through the model in this process.
        metrics: the metrics of the last step.
        evaluation: the metrics of the last evaluation; empty if there was none.
        best: the models of the best evaluation; None if evaluations were not compared.
        stopped_early: whether the run ended early because the evaluations stopped improving.
        keep: writes a checkpoint of the last step, unless it exists; to be called on every rank if
            something fails after the training.
    """

    model: nn.Module
    steps: int
    seconds: float
    tokens: int
    metrics: dict[str, float]
    evaluation: dict[str, float]
    best: BestModel | None = None
    stopped_early: bool = False
    keep: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)


def run_training(
    model: nn.Module,
    objective: Objective,
    stream: UpdateStream,
    opened: OpenedRun,
    evaluate: Evaluate | None = None,
    models: ModelFolders | None = None,
    hooks: Sequence[Hook] = (),
) -> TrainingOutcome:
    """Train until the stream ends.

    Args:
        model: the trainable module, with weights in float32; only `forward(batch)` is called.
        objective: defines the terms of the loss.
        stream: yields the micro-batches of each optimiser step.
        opened: the run; its settings determine steps, optimiser, logging and checkpoints.
        evaluate: called with the prepared model every `eval_steps` steps and at the end, on every
            rank.
        models: writes the models that are kept during training; None = keep none.
        hooks: called between steps.

    Raises:
        UserError: --load_best_model_at_end or --early_stopping_patience is set without an
            evaluation; all checkpoints of a resumed run are damaged; or the disk is full.
        NonFiniteError: loss, gradient or a weight is NaN or infinite.
        StoppedBySignal: after SIGTERM or SIGINT, with a checkpoint written.
    """
    loop = _Loop(model, objective, stream, opened, evaluate, models, hooks)
    config, parallel = opened.config, opened.parallel
    # In `rrhf train iterative`, each rank checks for itself whether a round's training had begun. A
    # late rank sees what the main rank has just begun, so the main rank's answer counts.
    if parallel.gather([config.resume_from_checkpoint])[0]:
        loop.resume()
    else:
        loop.cut_back(0, {})
    tracker = build_tracker(config, opened.run.path, parallel.is_main)
    with contextlib.closing(tracker), contextlib.ExitStack() as ours:
        held = ours if opened.held is None else opened.held
        held.enter_context(caught_signals(opened.stop))
        return loop.run(tracker)


class _Loop:
    """The state of one call of `run_training`."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        stream: UpdateStream,
        opened: OpenedRun,
        evaluate: Evaluate | None,
        models: ModelFolders | None,
        hooks: Sequence[Hook],
    ) -> None:
        config, parallel = opened.config, opened.parallel
        self.config, self.folder, self.parallel = config, opened.run, parallel
        self.stream, self.evaluate, self.hooks = stream, evaluate, Hooks(hooks)
        self.live = stream if isinstance(stream, LiveStream) else None
        self.stop, self.phases = opened.stop, opened.phases
        self.kept = KeptModels(opened.run.path, models, config, parallel, evaluate is not None)
        model.train()
        optimizer: torch.optim.Optimizer = build_optimizer(model, config)
        model, optimizer = parallel.prepare(model, optimizer, config.max_grad_norm)
        self.model, self.optimizer = model, optimizer
        self.scheduler = build_scheduler(optimizer, config, stream.total_steps)
        self.update = Update(
            model, optimizer, objective, parallel, config.max_grad_norm, opened.run.path
        )
        self.checkpointer = Checkpointer(
            opened.run.checkpoints, parallel, model, optimizer, config.save_total_limit
        )
        self.tracker = Tracker()
        self.settings = optimizer_settings(optimizer)
        self.step = 0
        self.saved_step = -1
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.evaluated_step = -1

    def resume(self) -> None:
        """Restore the newest checkpoint, and remove what was written after it."""
        state = self.checkpointer.restore()
        if state is None:
            self.folder.require_no_lost_checkpoints()
            logger.info("no complete checkpoint in %s: starting anew", self.folder.checkpoints)
            self.cut_back(0, {})
            return
        self.step = self.saved_step = int(state["step"])
        # If the run was killed after its last step, no further step would compute these metrics.
        self.metrics, self.evaluation = state["metrics"], state["evaluation"]
        self.evaluated_step = int(state["evaluated_step"])
        self.stream.load_state_dict(state["stream"])
        self.scheduler.load_state_dict(state["scheduler"])
        self._take_changed_settings(state)
        self.cut_back(self.step, state)
        tensors = self.hooks.load_tensors(state["tensors"])
        if self.live is not None:
            self.live.load_tensors(tensors)

    def _take_changed_settings(self, state: dict[str, Any]) -> None:
        """Apply the current optimiser and schedule settings instead of the checkpoint's.

        Raises:
            UserError: the settings of a sharded optimiser changed.
        """
        now, before = self.settings, state.get("optimizer_settings")
        if self.parallel.is_sharded:
            if before is None:  # an earlier version wrote the checkpoint
                before = [{"learning_rate": rate} for rate in self.scheduler.base_lrs]
            changed = [
                (name, was[name], its[name])
                for was, its in zip(before, now, strict=False)
                for name in was
                if was[name] != its[name]
            ]
            if changed:
                raise UserError(
                    f"resume: the optimiser's settings changed:\n{describe_changes(changed)}\nA "
                    "sharded optimiser keeps the settings of its checkpoint; use the same "
                    "settings, or begin a new run without sharding"
                )
            if "optimizer_settings" not in state:
                self._warn_of_unknown_settings()
        elif now != (before or optimizer_settings(self.optimizer)):
            apply_settings(self.optimizer, self.scheduler, now)
        follow_schedule(self.optimizer, self.scheduler)

    def _warn_of_unknown_settings(self) -> None:
        """Warn that a sharded optimiser keeps settings that its old checkpoint does not record."""

        def shown(groups: list[dict[str, Any]]) -> str:
            """Describe the settings of the groups, each combination once."""
            names = ("weight_decay", "betas", "eps")
            kinds = (", ".join(f"{name} {group.get(name)}" for name in names) for group in groups)
            return "; ".join(dict.fromkeys(kinds))

        logger.warning(
            "resume: an earlier version wrote this checkpoint, without the settings of its sharded "
            "optimiser, so rrhf cannot tell whether --weight_decay, --adam_beta1, --adam_beta2 or "
            "--adam_epsilon changed; the optimiser continues with %s (the flags give %s). Use "
            "the values of the run so far; to change them, begin a new run",
            shown(self.optimizer.param_groups),
            shown(self.settings),
        )

    def cut_back(self, step: int, state: dict[str, Any]) -> None:
        """Reset hooks, metrics and kept models to a checkpoint, and remove everything later.

        Args:
            step: the step of the checkpoint; 0 = the beginning of the run.
            state: the state in the checkpoint; empty = the beginning of the run.
        """
        self.hooks.load_state_dict(state)  # first: one may refuse
        if self.parallel.is_main:
            self.folder.metrics.truncate_to(int(state.get("metrics_offset", 0)))
        self.kept.cut_back(step, state.get("best", {}))

    def run(self, tracker: Tracker) -> TrainingOutcome:
        self.tracker = tracker
        self.hooks.begin(tracker, self.optimizer)
        started = time.monotonic()
        try:
            tokens = self._train()
        except Resumable:
            if self.step:
                self._save()
            raise
        except StoppedBySignal as stopped:
            self._save()
            raise StoppedBySignal(
                stopped.exit_code,
                f"stopped at step {self.step} of {self.stream.total_steps}; continue with "
                "--resume_from_checkpoint",
            ) from stopped
        is_whole = self.step == self.stream.total_steps
        assert is_whole or self.kept.is_over, f"only {self.step} of the planned steps were done"
        return TrainingOutcome(
            model=self.parallel.unwrap(self.model),
            steps=self.step,
            seconds=time.monotonic() - started,
            tokens=tokens,
            metrics=self.metrics,
            evaluation=self.evaluation,
            best=self.kept.best,
            stopped_early=not is_whole,
            keep=self.keep,
        )

    def _train(self) -> int:
        """Do all remaining steps and evaluations; return the tokens of the steps."""
        tokens, stream = 0, self.stream
        rollout: dict[str, float] = {}
        with Progress("train", stream.total_steps, "step", self.step) as progress:
            if self.step and self._is_due(self.config.eval_steps):
                self._evaluate()  # in case a signal interrupted this evaluation
            for batches in () if self.kept.is_over else stream:
                if self.live is not None and (news := self.live.take_news()):
                    rollout = news
                    self._log(news)
                batches = [*self.hooks.before_step(self.step + 1), *batches]
                before = time.monotonic()
                row, step_tokens = self._measured_update(batches)
                tokens += step_tokens
                self.step += 1
                self.metrics = {
                    **row,
                    "learning_rate": self.learning_rate,
                    "tokens_per_second": step_tokens / max(time.monotonic() - before, 1e-9),
                }
                self.scheduler.step()
                self.metrics |= self.hooks.after_step(self.step, self.metrics)
                if self._is_due(self.config.logging_steps) or self.step == stream.total_steps:
                    self._log(self.metrics)
                progress.total = stream.total_steps
                progress.advance(figures=figures(rollout | self.metrics, SHOWN))
                self._require_finite()
                self.kept.after_step(self.step)
                if self._is_due(self.config.eval_steps):
                    self._evaluate()
                if signalled := int(self.parallel.max(self.stop.exit_code)):
                    raise StoppedBySignal(signalled, "a signal came during the step")
                if self._is_due(self.config.save_steps):
                    self._save()
                if self.kept.is_over:
                    break
            self._evaluate()
        return tokens

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def _measured_update(self, batches: list[TokenBatch]) -> tuple[dict[str, float], int]:
        if self.phases is None:
            return self.update(batches, self.step + 1)
        with self.phases(TRAIN) as spent:
            row, num_tokens = self.update(batches, self.step + 1)
            spent.tokens = num_tokens // self.parallel.world_size
        return row | as_metrics(self.phases.take()), num_tokens

    def _evaluate(self) -> None:
        """Evaluate the model, unless this step was evaluated already.

        If the evaluation fails in a run of one process, a checkpoint is written.
        """
        if self.evaluate is None or self.evaluated_step == self.step:
            return
        before = self.evaluation, self.evaluated_step
        offset = self.folder.metrics.offset if self.parallel.is_main else 0
        try:
            self._measure(self.evaluate)
        except StoppedBySignal:
            raise
        except Exception:
            # The resumed run evaluates again. With several ranks, perhaps only one has failed, and
            # the others would not take part in a checkpoint.
            if self.parallel.world_size == 1:
                self.evaluation, self.evaluated_step = before
                self.folder.metrics.truncate_to(offset)
                self.keep()
            raise

    def _measure(self, evaluate: Evaluate) -> None:
        self.model.eval()
        with torch.no_grad():
            self.evaluation, self.evaluated_step = evaluate(self.model), self.step
        self.model.train()
        if self.evaluation:
            self._log({f"eval_{name}": value for name, value in self.evaluation.items()})
        told = held_out_figures(self.evaluation) or "no figures"
        logger.info("step %d, held out: %s", self.step, told)
        self.kept.after_evaluation(self.step, self.evaluation)

    def _log(self, figures: dict[str, float]) -> None:
        if self.parallel.is_main:
            row = {"step": self.step, **figures}
            self.folder.metrics.append(row)
            self.tracker.log(row, self.step)

    def keep(self) -> None:
        """Write a checkpoint after a failure; if that fails too, only log a warning."""
        try:
            self._save()
        except Exception as error:
            logger.warning(
                "step %d: the checkpoint could not be written either: %s", self.step, error
            )

    def _save(self) -> None:
        if self.saved_step == self.step:
            return
        if self.parallel.is_main:
            self.folder.metrics.sync()
        stream_tensors = {} if self.live is None else self.live.tensors()
        self.checkpointer.save(
            self.step,
            {
                "stream": self.stream.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "optimizer_settings": self.settings,
                "metrics": self.metrics,
                "evaluation": self.evaluation,
                "evaluated_step": self.evaluated_step,
                "metrics_offset": self.folder.metrics.offset if self.parallel.is_main else 0,
                "best": self.kept.state_dict(),
                "hooks": self.hooks.state_dict(),
            },
            {**stream_tensors, **self.hooks.tensors()},
        )
        self.saved_step = self.step
        if self.parallel.is_main:
            self.folder.note_checkpoint()
        self.kept.after_checkpoint()

    def _require_finite(self) -> None:
        """Check the weights before anything of this step is written.

        Raises:
            NonFiniteError: a trained weight is NaN or infinite, on any rank.
        """
        if self.update.left_non_finite:
            trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            found = first_non_finite(trained)
            kept = f"step {self.saved_step}" if self.saved_step > 0 else "no step yet"
            raise NonFiniteError(
                f"step {self.step}: the weights are not finite (first: {found or 'elsewhere'}), so "
                f"nothing of this step is kept; the last checkpoint is of {kept}. Lower "
                "--learning_rate and continue with --resume_from_checkpoint"
            )

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0
