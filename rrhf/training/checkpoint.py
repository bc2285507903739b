"""Checkpoints that are whole or not there: staged, synced, renamed, a SHA-256 manifest inside.

A checkpoint is a folder `step-<n>` with the trained weights, the optimiser, the random state and
`trainer_state.json`; its `manifest.json` is written last and lists size and hash of every file.
Resuming takes the newest one whose manifest is complete and whose files match; an older checkpoint
is deleted only after the newer one is whole. Order is by step number, never by clock.

Weights and optimiser of one process (or DDP) are ours; sharded ones are accelerate's own form.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rrhf.errors import UserError
from rrhf.files import (
    COMPLETE,
    UNFINISHED,
    explained_os_errors,
    read_manifest,
    sha256_file,
    sync_folder,
    write_json,
    write_manifest,
)
from rrhf.training.parallel import Parallel

logger = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, RANDOM, STATE, STREAM = (
    "trained.safetensors",
    "optimizer.pt",
    "random.pt",
    "trainer_state.json",
    "stream.safetensors",
)
_NAME = re.compile(r"step-(\d+)")


class Checkpointer:
    """Saves and restores everything that the next optimiser step depends on.

    Args:
        folder: `checkpoints/` of the run.
        parallel: ranks and engine.
        model: the prepared trainable root.
        optimizer: the prepared optimiser.
        keep: complete checkpoints that stay; at least 1.
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
            raise UserError(f"--save_total_limit {keep}: at least one checkpoint must stay")
        self.folder = folder
        self._parallel = parallel
        self._model = model
        self._optimizer = optimizer
        self._keep = keep

    def save(
        self, step: int, state: dict[str, Any], tensors: dict[str, torch.Tensor] | None = None
    ) -> Path:
        """Write checkpoint `step`.

        Args:
            step: its number.
            state: plain values: stream, scheduler, metrics.
            tensors: what the stream holds beside them, the same on every rank.
        """
        target = self.folder / f"step-{step}"
        staged = self.folder / f".staged-{step}"
        if self._parallel.is_main:
            remove_unfinished(self.folder)
            staged.mkdir(parents=True)
        self._parallel.barrier()
        with explained_os_errors(staged):
            if self._parallel.is_sharded:
                self._parallel.accelerator.save_state(str(staged / "engine"))
            elif self._parallel.is_main:
                save_file(self._trained_weights(), staged / WEIGHTS)
                _save_torch(self._optimizer.state_dict(), staged / OPTIMIZER)
            _save_torch(_random_state(), staged / self._random_file(self._parallel.rank))
            if self._parallel.is_main:
                if tensors:
                    save_file(tensors, staged / STREAM)
                write_json(staged / STATE, {"step": step, "engine": self._parallel.kind, **state})
        self._parallel.barrier()
        if self._parallel.is_main:
            seal(staged)
            if target.exists():  # an incomplete folder of the same step: never chosen, now replaced
                shutil.rmtree(target)
            os.replace(staged, target)
            sync_folder(self.folder)
            self._delete_old()
        self._parallel.barrier()
        return target

    def restore(self) -> dict[str, Any] | None:
        """Load the newest complete checkpoint.

        Returns:
            its state, with the stream's tensors as "tensors"; None where there is none.
        """
        newest = newest_complete(self.folder)
        if newest is None:
            return None
        state: dict[str, Any] = json.loads((newest / STATE).read_text())
        self._require_same_engine(newest, state)
        if self._parallel.is_sharded:
            self._parallel.accelerator.load_state(str(newest / "engine"))
        else:
            self._load_weights(newest / WEIGHTS)
            self._optimizer.load_state_dict(
                torch.load(newest / OPTIMIZER, map_location="cpu", weights_only=True)
            )
        random = newest / self._random_file(self._parallel.rank)
        if not random.exists():  # earlier checkpoints, and those of fewer ranks
            random = newest / RANDOM
        _set_random_state(torch.load(random, weights_only=True))
        tensors = newest / STREAM
        state["tensors"] = load_file(tensors) if tensors.exists() else {}
        logger.info("resuming from %s", newest)
        return state

    def _require_same_engine(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Sharded weights are kept in their engine's own form.

        Raises:
            UserError: another engine wrote the checkpoint.
        """
        mine, its = self._parallel.kind, state.get("engine", self._parallel.kind)
        was_sharded = (checkpoint / "engine").is_dir()
        if was_sharded != self._parallel.is_sharded or (was_sharded and mine != its):
            raise UserError(
                f"resume: {checkpoint} was written under {its if was_sharded else 'no sharding'}, "
                f"and this launch runs {mine}; start with the launch that the checkpoint had"
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
        saved = load_file(path)
        mine = {n: p for n, p in self._root().named_parameters() if p.requires_grad}
        if saved.keys() != mine.keys():
            different = sorted(saved.keys() ^ mine.keys())
            raise UserError(
                f"{path}: holds other weights than this model trains (first: {different[0]}); "
                "resume with the model and LoRA settings that the checkpoint had"
            )
        for name, value in saved.items():
            mine[name].copy_(value)

    def _delete_old(self) -> None:
        complete = [path for path in checkpoints_by_step(self.folder) if is_complete(path)]
        for path in complete[: -self._keep]:
            # Renamed first: a kill in the middle of the deletion must not leave half a checkpoint.
            doomed = path.with_name(f".doomed-{path.name}")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def seal(folder: Path, known: Mapping[str, Any] | None = None) -> None:
    """Sync every file of a folder and write its manifest with sizes and hashes, last.

    Args:
        folder: filled.
        known: what else the manifest should say.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_manifest(folder, {"status": COMPLETE, **(known or {}), "files": files})


def is_complete(folder: Path) -> bool:
    """True where the manifest says complete (its hashes are checked by `damage_of`)."""
    manifest = read_manifest(folder)
    return manifest is not None and manifest.get("status", UNFINISHED) == COMPLETE


def damage_of(folder: Path) -> str | None:
    """What is wrong with a sealed folder's files, or None."""
    manifest = read_manifest(folder) or {}
    for name, known in manifest.get("files", {}).items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != known["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}"
        if sha256_file(path) != known["sha256"]:
            return f"{name} has other bytes than were written"
    return None


def checkpoints_by_step(folder: Path) -> list[Path]:
    """Folders `step-<n>`, oldest step first."""
    if not folder.is_dir():
        return []
    named = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(named, key=lambda pair: int(pair[0].group(1)))]


def newest_complete(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; what is passed over is said once each."""
    for path in reversed(checkpoints_by_step(folder)):
        problem = "it is incomplete" if not is_complete(path) else damage_of(path)
        if problem is None:
            return path
        logger.warning("%s is passed over: %s", path, problem)
    return None


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed save or deletion left behind."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((".staged-", ".doomed-")):
                shutil.rmtree(path)


def saved_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder beside its place and move it there whole, in place of an older one.

    Args:
        target: such as `policy/`.
        write: fills the folder that it is given.
    """
    staged = target.with_name(f".staged-{target.name}")
    old = target.with_name(f".doomed-{target.name}")
    for leftover in (staged, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    with explained_os_errors(target):
        staged.mkdir(parents=True)
        write(staged)
        for path in staged.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        if target.exists():
            os.replace(target, old)
        os.replace(staged, target)
        sync_folder(target.parent)
        if old.exists():
            shutil.rmtree(old)


def _save_torch(value: Any, path: Path) -> None:
    torch.save(value, path)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
