"""The only training loop: losses that are sums over global counts, one optimiser step at a time.

A paradigm is an `Objective`: named terms, each a sum with a weight, divided by a denominator that
is known before the forward and summed over ranks and micro-batches first. So accumulation, uneven
ranks and padding cannot change a loss, and a zero denominator makes its term zero. Data come from
an `UpdateStream`; SFT, reward, rank and PPO differ in these two alone.

A loss or gradient that is not finite stops the run before the step, with the batch written out; a
checkpoint may follow any step; SIGTERM and SIGINT end the run after one, and work between two steps
that watches for them, as a rollout does, is dropped, to be done again on resume.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from rrhf.data.collate import TokenBatch
from rrhf.errors import StoppedBySignal
from rrhf.runs import RunFolder
from rrhf.signals import StopRequest, caught_signals
from rrhf.training.best import BestModel
from rrhf.training.checkpoint import Checkpointer
from rrhf.training.config import TrainingConfig
from rrhf.training.kept_models import KeptModels
from rrhf.training.model_folders import ModelFolders
from rrhf.training.offload import TRAIN
from rrhf.training.optim import build_optimizer, build_scheduler
from rrhf.training.parallel import Parallel
from rrhf.training.phases import Phases, as_metrics
from rrhf.training.sample_table import SampleTable
from rrhf.training.streams import LiveStream, UpdateStream
from rrhf.training.tracking import Tracker, build_tracker

logger = logging.getLogger(__name__)


@dataclass
class Term:
    """One named part of a loss: `weight * total / denominator` enters the gradient.

    Attributes:
        total: scalar sum over this micro-batch, filler prompts at weight zero.
        weight: of the term in the loss.
        metrics: (total, count) scalars without gradient, averaged over everything for the log.
    """

    total: Tensor
    weight: float = 1.0
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Objective(Protocol):
    """What one paradigm is."""

    def denominators(self, batch: TokenBatch) -> dict[str, Tensor]:
        """A scalar for each term name, from the batch alone."""
        ...

    def __call__(self, outputs: Any, batch: TokenBatch) -> dict[str, Term]:
        """The terms, under the same names."""
        ...


class NonFiniteError(RuntimeError):
    """A loss or gradient became NaN or infinite; the weights are still those before the step."""


@dataclass(frozen=True)
class TrainingOutcome:
    """What a finished training leaves.

    Attributes:
        model: the trained root, unwrapped.
        steps: optimiser steps done in all.
        seconds: wall time of this process, resumed parts not counted.
        tokens: response and prompt tokens that went through the model in this process.
        metrics: the last logged row.
        evaluation: the last evaluation, or empty.
        best: the best of them, where one was looked for.
        stopped_early: the evaluations did not get better, and steps are left out.
    """

    model: nn.Module
    steps: int
    seconds: float
    tokens: int
    metrics: dict[str, float]
    evaluation: dict[str, float]
    best: BestModel | None = None
    stopped_early: bool = False


def run_training(
    model: nn.Module,
    objective: Objective,
    stream: UpdateStream,
    config: TrainingConfig,
    run: RunFolder,
    parallel: Parallel,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    models: ModelFolders | None = None,
    stop: StopRequest | None = None,
    samples: SampleTable | None = None,
    phases: Phases | None = None,
    on_optimizer: Callable[[torch.optim.Optimizer], None] | None = None,
) -> TrainingOutcome:
    """Train until the stream ends.

    Args:
        model: the trainable root, whose `forward(batch)` is the one door; weights in float32.
        objective: the terms of the loss.
        stream: micro-batches of each optimiser step.
        config: steps, optimiser, logging, checkpoints.
        run: an opened run folder (on the main rank).
        parallel: ranks and engine.
        evaluate: called with the prepared model every `eval_steps` and at the end, on every rank.
        models: how what is trained is written, where models are to be kept on the way.
        stop: notes the signals that come, for a stream or an evaluation that watches for them. It
            may raise `StoppedBySignal`, on all ranks, where it has changed nothing.
        samples: that the stream and the evaluation fill.
        phases: measures each step as the phase "train"; what it finds enters the step's row.
        on_optimizer: is given the prepared optimiser.

    Raises:
        UserError: --load_best_model_at_end or --early_stopping_patience without an evaluation.
        NonFiniteError: loss or gradient is NaN or infinite.
        StoppedBySignal: after SIGTERM or SIGINT, with a checkpoint written.
    """
    kept = KeptModels(run.path, models, config, parallel, evaluate is not None)
    model.train()
    optimizer: torch.optim.Optimizer = build_optimizer(model, config)
    model, optimizer = parallel.prepare(model, optimizer, config.max_grad_norm)
    scheduler = build_scheduler(optimizer, config, stream.total_steps)
    if on_optimizer is not None:
        on_optimizer(optimizer)
    checkpointer = Checkpointer(
        run.checkpoints, parallel, model, optimizer, config.save_total_limit
    )
    loop = _Loop(model, optimizer, scheduler, objective, config, run, parallel, checkpointer, kept)
    loop.samples, loop.phases = samples, phases
    if config.resume_from_checkpoint:
        loop.resume(stream)
    else:
        loop.cut_back(0, {})
    open_tracker = contextlib.closing(build_tracker(config, run.path, parallel.is_main))
    with open_tracker as tracker, caught_signals(stop) as stop:
        if samples is not None:
            samples.send_to(tracker)
        return loop.run(stream, evaluate, tracker, stop)


class _Loop:
    """The state of one call of `run_training`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        objective: Objective,
        config: TrainingConfig,
        run: RunFolder,
        parallel: Parallel,
        checkpointer: Checkpointer,
        kept: KeptModels,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.objective, self.config, self.folder = objective, config, run
        self.parallel, self.checkpointer, self.kept = parallel, checkpointer, kept
        self.phases: Phases | None = None
        self.step = 0
        self.saved_step = -1
        self.samples: SampleTable | None = None
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.evaluated_step = -1

    def resume(self, stream: UpdateStream) -> None:
        """Take up the newest checkpoint and cut back to it what was written later."""
        state = self.checkpointer.restore()
        if state is None:
            logger.info("no complete checkpoint in %s: starting anew", self.folder.checkpoints)
            self.cut_back(0, {})
            return
        self.step = self.saved_step = int(state["step"])
        # A run that was killed behind its last step has nothing left to measure.
        self.metrics, self.evaluation = state["metrics"], state["evaluation"]
        self.evaluated_step = int(state["evaluated_step"])
        stream.load_state_dict(state["stream"])
        if isinstance(stream, LiveStream):
            stream.load_tensors(state["tensors"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.cut_back(self.step, state)

    def cut_back(self, step: int, state: dict[str, Any]) -> None:
        """Forget what the run folder holds of steps after `step`; no state = of all."""
        if self.parallel.is_main:
            self.folder.metrics.truncate_to(int(state.get("metrics_offset", 0)))
        self.kept.cut_back(step, state.get("best", {}))
        if self.samples is not None:
            self.samples.load_state_dict(state.get("samples", {}))

    def run(
        self,
        stream: UpdateStream,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        tracker: Tracker,
        stop: StopRequest,
    ) -> TrainingOutcome:
        started = time.monotonic()
        try:
            tokens = self._train(stream, evaluate, tracker, stop)
        except StoppedBySignal as stopped:
            self._save(stream)
            raise StoppedBySignal(
                stopped.exit_code,
                f"stopped at step {self.step} of {stream.total_steps}; go on with "
                "--resume_from_checkpoint",
            ) from stopped
        if self.step != stream.total_steps and not self.kept.is_over:
            raise AssertionError(f"{self.step} steps done of {stream.total_steps} planned")
        return TrainingOutcome(
            model=self.parallel.unwrap(self.model),
            steps=self.step,
            seconds=time.monotonic() - started,
            tokens=tokens,
            metrics=self.metrics,
            evaluation=self.evaluation,
            best=self.kept.best,
            stopped_early=self.step != stream.total_steps,
        )

    def _train(
        self,
        stream: UpdateStream,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        tracker: Tracker,
        stop: StopRequest,
    ) -> int:
        """All steps and evaluations that are left; returns the tokens of the steps."""
        tokens = 0
        bar = tqdm(
            total=stream.total_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=None if self.parallel.is_main else True,
        )
        with bar:
            if evaluate is not None and self.step and self._is_due(self.config.eval_steps):
                self._evaluate(evaluate, tracker)  # left undone where a signal came during it
            for batches in () if self.kept.is_over else stream:
                if isinstance(stream, LiveStream) and (news := stream.take_news()):
                    self._log({"step": self.step, **news}, tracker)
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
                stream.observe(self.metrics)
                if isinstance(stream, LiveStream):
                    self.metrics |= stream.metrics()
                if self._is_due(self.config.logging_steps) or self.step == stream.total_steps:
                    self._log({"step": self.step, **self.metrics}, tracker)
                bar.update()
                bar.set_postfix_str(_brief(self.metrics))
                self.kept.after_step(self.step)
                if evaluate is not None and self._is_due(self.config.eval_steps):
                    self._evaluate(evaluate, tracker)
                if signalled := self._signalled(stop):
                    raise StoppedBySignal(signalled, "a signal came during the step")
                if self._is_due(self.config.save_steps):
                    self._save(stream)
                if self.kept.is_over:
                    break
            if evaluate is not None:
                self._evaluate(evaluate, tracker)
        return tokens

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def _measured_update(self, batches: list[TokenBatch]) -> tuple[dict[str, float], int]:
        if self.phases is None:
            return self._update(batches)
        with self.phases(TRAIN) as spent:
            row, num_tokens = self._update(batches)
            spent.tokens = num_tokens // self.parallel.world_size
        return row | as_metrics(self.phases.take()), num_tokens

    def _update(self, batches: list[TokenBatch]) -> tuple[dict[str, float], int]:
        """One optimiser step over its micro-batches; returns metrics and tokens over all ranks."""
        batches = [batch.to(self.parallel.device) for batch in batches]
        denominators = self._denominators(batches)
        totals: dict[str, Tensor] = {}
        weights: dict[str, float] = {}
        for position, batch in enumerate(batches):
            is_last = position == len(batches) - 1
            with self.parallel.micro_step(self.model, is_last):
                terms = self.objective(self.model(batch), batch)
                loss = _loss(terms, denominators)
                self._require_finite(loss, batch)
                self.parallel.backward(loss)
            _add(totals, terms)
            weights = {name: term.weight for name, term in terms.items()}
        norm = self.parallel.take_step(self.model, self.optimizer, self.config.max_grad_norm)
        if math.isinf(norm) or (math.isnan(norm) and self.parallel.kind != "DEEPSPEED"):
            self._stop(f"the gradient norm is {norm}", batches[-1])
        row, num_tokens = self._metrics(totals, weights, denominators, batches)
        return {**row, "grad_norm": norm}, num_tokens

    def _denominators(self, batches: list[TokenBatch]) -> dict[str, Tensor]:
        summed: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in self.objective.denominators(batch).items():
                value = value.detach().double()
                summed[name] = summed[name] + value if name in summed else value
        names = sorted(summed)
        stacked = self.parallel.sum(torch.stack([summed[name].cpu() for name in names]))
        return dict(zip(names, stacked, strict=True))

    def _require_finite(self, loss: Tensor, batch: TokenBatch) -> None:
        """Agreed over ranks, so that none goes into a backward pass alone."""
        value = float(loss.detach())
        if self.parallel.any(not math.isfinite(value)):
            self._stop(f"the loss is {value} on rank {self.parallel.rank}", batch)

    def _stop(self, what: str, batch: TokenBatch) -> None:
        name = f"non_finite_step_{self.step + 1}_rank_{self.parallel.rank}.safetensors"
        path = self.folder.path / name
        tensors = {
            f.name: value.cpu().contiguous()
            for f in fields(batch)
            if isinstance(value := getattr(batch, f.name), Tensor)
        }
        for extras in (batch.extras, batch.token_extras):
            tensors |= {f"extra.{name}": value.cpu() for name, value in extras.items()}
        save_file(tensors, path)
        raise NonFiniteError(
            f"step {self.step + 1}: {what}; stopped before the weights changed. The batch is in "
            f"{path}; lower the learning rate, or look at that batch"
        )

    def _metrics(
        self,
        totals: dict[str, Tensor],
        weights: dict[str, float],
        denominators: dict[str, Tensor],
        batches: list[TokenBatch],
    ) -> tuple[dict[str, float], int]:
        """Means over ranks and micro-batches; the loss as it entered the gradient."""
        names = sorted(totals)
        num_tokens = sum(_num_tokens(batch) for batch in batches)
        counted = torch.tensor([[float(num_tokens), 0.0]], dtype=torch.float64)
        summed = self.parallel.sum(torch.cat([*(totals[n][None] for n in names), counted]))
        values = dict(zip(names, summed[:-1].tolist(), strict=True))
        losses = {
            name: _ratio(values.pop(_TERM + name)[0], float(denominators[name])) for name in weights
        }
        row = {"loss": sum(weights[name] * value for name, value in losses.items())}
        row |= {f"{name}_loss": value for name, value in losses.items()}
        row |= {name: _ratio(total, count) for name, (total, count) in values.items()}
        return row, int(summed[-1, 0])

    def _evaluate(
        self, evaluate: Callable[[nn.Module], dict[str, float]], tracker: Tracker
    ) -> None:
        """Once for each step, however often it is asked for."""
        if self.evaluated_step == self.step:
            return
        self.model.eval()
        with torch.no_grad():
            self.evaluation, self.evaluated_step = evaluate(self.model), self.step
        self.model.train()
        row = {f"eval_{name}": value for name, value in self.evaluation.items()}
        self._log({"step": self.step, **row}, tracker)
        self.kept.after_evaluation(self.step, self.evaluation)

    def _log(self, row: dict[str, float], tracker: Tracker) -> None:
        if self.parallel.is_main:
            self.folder.metrics.append(row)
            tracker.log(row, self.step)

    def _save(self, stream: UpdateStream) -> None:
        if self.saved_step == self.step:
            return
        if self.parallel.is_main:
            self.folder.metrics.sync()
        self.checkpointer.save(
            self.step,
            {
                "stream": stream.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "metrics": self.metrics,
                "evaluation": self.evaluation,
                "evaluated_step": self.evaluated_step,
                "metrics_offset": self.folder.metrics.offset if self.parallel.is_main else 0,
                "best": self.kept.state_dict(),
                "samples": {} if self.samples is None else self.samples.state_dict(),
            },
            stream.tensors() if isinstance(stream, LiveStream) else None,
        )
        self.saved_step = self.step
        self.kept.after_checkpoint()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _signalled(self, stop: StopRequest) -> int:
        """The exit code that a signal on any rank asks for, or 0."""
        return int(self.parallel.max(stop.exit_code))


_TERM = "term:"


def _loss(terms: dict[str, Term], denominators: dict[str, Tensor]) -> Tensor:
    loss = torch.zeros(())
    for name, term in terms.items():
        denominator = float(denominators[name])
        scale = term.weight / denominator if denominator else 0.0
        loss = loss.to(term.total.device) + term.total * scale
    return loss


def _add(totals: dict[str, Tensor], terms: dict[str, Term]) -> None:
    """Add one micro-batch's totals: under a term's own key, and each metric's (total, count)."""
    for name, term in terms.items():
        pairs = {_TERM + name: (term.total, torch.zeros(())), **term.metrics}
        for key, (total, count) in pairs.items():
            pair = torch.stack([total.detach().double().cpu(), count.detach().double().cpu()])
            totals[key] = totals[key] + pair if key in totals else pair


def _num_tokens(batch: TokenBatch) -> int:
    prompts = batch.prompt_lengths[batch.prompt_index]
    return int(((prompts + batch.response_lengths) * (batch.row_weights > 0)).sum())


def _ratio(total: float, count: float) -> float:
    return total / count if count else 0.0


def _brief(metrics: dict[str, float]) -> str:
    shown = {k: v for k, v in metrics.items() if k.endswith("loss") or k == "tokens_per_second"}
    return " ".join(f"{name} {value:.4g}" for name, value in shown.items())
