"""Writes and restores checkpoints that are complete or absent: staged, synced, sealed, renamed.

A checkpoint is a folder `step-<n>` with the trained weights, the optimiser, the random state and
`trainer_state.json`; its `manifest.json` is written last and lists size and hash of every file.
A run resumes from its newest undamaged checkpoint; if all of its checkpoints are damaged, it stops
with an error instead of starting over. An older checkpoint is deleted only after the newer one is
complete. Checkpoints are ordered by step number, never by time.

With one process or DDP, rrhf writes weights and optimiser state; if they are sharded, accelerate
writes them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from rrhf.errors import UserError
from rrhf.files import sync_folder, write_json
from rrhf.os_errors import explained_failure, explained_full_disk
from rrhf.sealed_folders import seal_folder
from rrhf.staged_folders import STAGED, no_trace_of_failure, remove_folder, remove_unfinished
from rrhf.training.core.checkpoint_folders import (
    OPTIMIZER,
    RANDOM,
    SHARDED,
    STATE,
    STREAM,
    WEIGHTS,
    checkpoints_by_step,
    is_complete,
    newest_whole,
    none_is_whole,
)
from rrhf.training.core.parallel import Parallel

logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores everything that the next optimiser step depends on.

    Args:
        folder: `checkpoints/` of the run.
        parallel: ranks, and how weights are spread over them.
        model: the prepared trainable module.
        optimizer: the prepared optimiser.
        keep: number of complete checkpoints to keep; at least 1.
    """

    def __init__(
        self,
        folder: Path,
        parallel: Parallel,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        keep: int = 2,
    ) -> None:
        if keep < 1:
            raise UserError(f"--save_total_limit {keep}: must be 1 or more, to keep a checkpoint")
        self.folder = folder
        self._parallel = parallel
        self._model = model
        self._optimizer = optimizer
        self._keep = keep
        self._passed_over: list[Path] = []

    def save(
        self, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None
    ) -> Path:
        """Write checkpoint `step`.

        Args:
            step: number of optimiser steps done.
            state: plain values, such as the states of stream and scheduler.
            tensors: the stream's tensors, the same on every rank.
        """
        target = self.folder / f"step-{step}"
        staged = self.folder / f"{STAGED}{step}"
        self._parallel.on_main(partial(self._begin, staged), staged)
        self._fill(staged, {"step": step, "launch": self._parallel.kind, **state}, tensors or {})
        self._parallel.on_main(partial(self._publish, staged, target), target)
        return target

    def _begin(self, staged: Path) -> None:
        remove_unfinished(self.folder)
        with no_trace_of_failure(staged):
            staged.mkdir(parents=True)

    def _publish(self, staged: Path, target: Path) -> None:
        if target.exists():  # an incomplete folder of the same step, which no run resumes from
            shutil.rmtree(target)
        os.replace(staged, target)
        sync_folder(self.folder)
        self._passed_over = [path for path in self._passed_over if path != target]
        self._delete_old()

    def _fill(self, staged: Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Write the parts of all ranks and seal them; if one rank fails, all ranks raise.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        failure: BaseException | None = None
        try:
            with explained_full_disk(self._needed_bytes(tensors)):
                self._write_parts(staged, state, tensors)
        except Exception as error:
            failure = error
        self._agree(failure, staged)
        try:
            if self._parallel.is_main:
                seal_folder(staged)
        except Exception as error:
            failure = error
        self._agree(failure, staged)

    def _agree(self, failure: BaseException | None, staged: Path) -> None:
        """After a failed write on any rank, clean up and raise on all ranks."""
        if not self._parallel.any(failure is not None):
            return
        if self._parallel.is_main:
            shutil.rmtree(staged, ignore_errors=True)
        self._parallel.barrier()
        if failure is None:
            raise UserError(
                f"{self.folder}: another process could not write its part of a checkpoint; see "
                "the message of that process"
            )
        raise explained_failure(failure, staged) from failure

    def _write_parts(
        self, staged: Path, state: dict[str, Any], tensors: dict[str, torch.Tensor]
    ) -> None:
        if self._parallel.is_sharded:
            self._parallel.accelerator.save_state(str(staged / SHARDED))
        elif self._parallel.is_main:
            save_file(self._trained_weights(), staged / WEIGHTS)
            _save_torch(self._optimizer.state_dict(), staged / OPTIMIZER)
        _save_torch(_random_state(), staged / self._random_file(self._parallel.rank))
        if self._parallel.is_main:
            if tensors:
                save_file(tensors, staged / STREAM)
            write_json(staged / STATE, state)

    def _needed_bytes(self, tensors: dict[str, torch.Tensor]) -> int:
        """Return the bytes of a checkpoint's tensors; for sharded tensors, an estimate for
        AdamW."""
        weights = self._trained_weights()
        if self._parallel.is_sharded:
            return 3 * sum(weight.nbytes for weight in weights.values())
        states = [*self._optimizer.state.values(), weights, tensors]
        return sum(v.nbytes for s in states for v in s.values() if isinstance(v, torch.Tensor))

    def restore(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint.

        Returns:
            The checkpoint's state, with the stream's tensors under the key "tensors"; None if there
            is no checkpoint.

        Raises:
            UserError: there are checkpoints but none is undamaged; or the newest was written with
                another launch or for other weights.
        """
        newest = self._newest_whole()
        if newest is None:
            return None
        state: dict[str, Any] = json.loads((newest / STATE).read_text())
        self._require_same_launch(newest, state)
        if self._parallel.is_sharded:
            self._parallel.accelerator.load_state(str(newest / SHARDED))
        else:
            self._load_weights(newest / WEIGHTS)
            self._optimizer.load_state_dict(
                torch.load(newest / OPTIMIZER, map_location="cpu", weights_only=True)
            )
        random = newest / self._random_file(self._parallel.rank)
        if not random.exists():  # written by an earlier version, or by fewer ranks
            random = newest / RANDOM
        _set_random_state(torch.load(random, weights_only=True))
        tensors = newest / STREAM
        state["tensors"] = load_file(tensors) if tensors.exists() else {}
        logger.info("resuming from %s", newest)
        return state

    def _newest_whole(self) -> Path | None:
        """Find the newest undamaged checkpoint on the main rank; damaged ones are logged.

        Raises:
            UserError: there are checkpoints but none is undamaged.
        """
        damaged: dict[str, str] = {}
        found: Path | None = None
        if self._parallel.is_main:
            found, damaged = newest_whole(self.folder)
            self._passed_over = [self.folder / name for name in damaged]
        answer = [(None if found is None else found.name, damaged)] * self._parallel.is_main
        name, damaged = self._parallel.gather(answer)[0]
        if name is not None:
            return self.folder / str(name)
        if damaged:
            raise none_is_whole(self.folder, damaged)
        return None

    def _require_same_launch(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that was written in the format of another launch.

        Raises:
            UserError: the checkpoint was written with another launch.
        """
        mine = self._parallel.kind
        its = state.get("launch", state.get("engine", mine))  # "engine" was the key before 0.2.0
        was_sharded = (checkpoint / SHARDED).is_dir()
        if was_sharded != self._parallel.is_sharded or (was_sharded and mine != its):
            raise UserError(
                f"resume: {checkpoint} was written with {its if was_sharded else 'no sharding'}, "
                f"and this launch uses {mine}; use the launch that wrote the checkpoint"
            )

    @staticmethod
    def _random_file(rank: int) -> str:
        return RANDOM if rank == 0 else f"random-{rank}.pt"

    def _root(self) -> nn.Module:
        return self._parallel.unwrap(self._model)

    def _trained_weights(self) -> dict[str, torch.Tensor]:
        return {
            name: value.detach().contiguous()
            for name, value in self._root().named_parameters()
            if value.requires_grad
        }

    @torch.no_grad()
    def _load_weights(self, path: Path) -> None:
        """Load the weights one by one, so that memory never holds all of them twice."""
        mine = {n: p for n, p in self._root().named_parameters() if p.requires_grad}
        with safe_open(path, framework="pt") as file:
            saved = set(file.keys())
            if saved != mine.keys():
                different = sorted(saved ^ mine.keys())
                raise UserError(
                    f"{path}: holds other weights than this model trains (first: {different[0]}); "
                    "resume with the model and LoRA settings of the checkpoint"
                )
            for name, weight in mine.items():
                weight.copy_(file.get_tensor(name))

    def _delete_old(self) -> None:
        """Delete damaged checkpoints, and complete ones except for the newest `keep`."""
        complete = [path for path in checkpoints_by_step(self.folder) if is_complete(path)]
        complete = [path for path in complete if path not in self._passed_over]
        for path in {*complete[: -self._keep], *(p for p in self._passed_over if p.exists())}:
            remove_folder(path)
        self._passed_over = []


def _save_torch(value: Any, path: Path) -> None:
    # Save into an open file: if torch opens the file, its error for a full disk gives no reason.
    with open(path, "wb") as file:
        torch.save(value, file)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
