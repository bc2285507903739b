"""Weights and optimiser state off the device while nobody needs them.

What is trained with PPO is not needed all the time: the reference reads, the reward model scores,
the optimiser's moments wait while responses are sampled. `Offload` is told which phases need which
tensors, and moves them when a phase begins: first out what it does not need, then in what it does.

Off a GPU means host memory, pinned. On a machine without one the device is the main memory, and off
means files in the run folder that are mapped, not loaded: what is read of them belongs to the
system's page cache, which gives it up when memory is short. Either way a tensor keeps its shape and
its bits and can be read where it is, so checkpoints and saved models are the same whatever is off.

Left out on purpose: weights that are spread over ranks (their engines have offloading of their own)
and gradients (there are none between two steps).
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from rrhf.files import explained_os_errors
from rrhf.training.core.hooks import Hook
from rrhf.training.core.tracking import Tracker

ALIGNMENT = 64
TRAIN = "train"
"""The phase that changes what is trained."""


class Store(Protocol):
    """Where tensors are while they are off the device.

    Attributes:
        where: that is, in words.
    """

    where: str

    def put(self, name: str, tensor: Tensor) -> Tensor:
        """Keep a tensor's bits under a name; returns a tensor that reads them there."""
        ...

    def kept(self, name: str, like: Tensor) -> Tensor:
        """The tensor that `put` returned for this name; nothing may have changed since."""
        ...

    def fetch(self, tensor: Tensor, is_constant: bool) -> Tensor:
        """A tensor on the device with these bits; one that is constant will not be written to."""
        ...

    def close(self) -> None: ...


class HostStore:
    """The host's memory, pinned, for what belongs on a GPU.

    Args:
        device: where tensors belong.
    """

    where = "host memory"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[str, Tensor] = {}

    def put(self, name: str, tensor: Tensor) -> Tensor:
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            pinned = self._device.type == "cuda"
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._copies[name] = copy
        return copy.copy_(tensor)

    def kept(self, name: str, like: Tensor) -> Tensor:
        return self._copies[name]

    def fetch(self, tensor: Tensor, is_constant: bool) -> Tensor:
        return tensor.to(self._device, copy=True)

    def close(self) -> None:
        self._copies.clear()


class FileStore:
    """Files that are mapped into memory, for what belongs in main memory.

    A tensor keeps its place within 64 bytes wherever it goes. Loaded weights do not begin at such a
    border, and sums of products may be rounded differently where they do.

    Args:
        folder: for them alone; what a killed run left there goes now, the rest with `close`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.where = f"mapped files in {folder}"
        self.close()

    def put(self, name: str, tensor: Tensor) -> Tensor:
        path = self._folder / name
        staged = path.with_suffix(".new")
        with explained_os_errors(path, tensor.nbytes):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(staged, "wb") as file:
                file.write(bytes(_misalignment(tensor)))
                _bytes_of(tensor).numpy().tofile(file)
            staged.replace(path)  # an older mapping keeps the older file
        return self.kept(name, tensor)

    def kept(self, name: str, like: Tensor) -> Tensor:
        path, start = str(self._folder / name), _misalignment(like)
        size = start + like.nbytes
        mapped = torch.from_file(path, shared=False, size=size, dtype=torch.uint8)
        return mapped[start:].view(like.dtype).view(like.shape)

    def fetch(self, tensor: Tensor, is_constant: bool) -> Tensor:
        if is_constant:
            return tensor
        room = torch.empty(tensor.nbytes + ALIGNMENT, dtype=torch.uint8)
        start = (_misalignment(tensor) - room.data_ptr()) % ALIGNMENT
        copy = room[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        return copy.copy_(tensor)

    def close(self) -> None:
        # What is still mapped stays readable: a file's bytes go with its last mapping.
        shutil.rmtree(self._folder, ignore_errors=True)


def _misalignment(tensor: Tensor) -> int:
    """By how many bytes it begins behind a border that vector instructions care for."""
    return tensor.data_ptr() % ALIGNMENT


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def build_store(device: torch.device, folder: Path) -> Store:
    """Host memory for a GPU, else files below a folder."""
    return HostStore(device) if device.type == "cuda" else FileStore(folder)


@dataclass
class _Held:
    """One tensor that comes and goes.

    Attributes:
        name: its own, in the store.
        tensor: the parameter or state itself; its data are exchanged.
        is_constant: never trained.
        is_stored: the store has its present bits.
    """

    name: str
    tensor: Tensor
    is_constant: bool
    is_stored: bool = False


@dataclass
class _Group:
    needed_in: frozenset[str]
    held: list[_Held] = field(default_factory=list)
    is_off: bool = False


class Offload(Hook):
    """Moves tensors as phases begin.

    Args:
        levels: of `LEVELS`; what belongs to none of them stays on the device.
        store: for what is off.

    Attributes:
        levels: what moves.
        moved_bytes: written to the store since the beginning.
    """

    def __init__(self, levels: Collection[str], store: Store) -> None:
        self.levels, self._store = frozenset(levels), store
        self._groups: list[_Group] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._optimizer_group: _Group | None = None
        self.moved_bytes = 0

    def add_frozen(self, module: nn.Module, needed_in: Collection[str]) -> None:
        """A frozen model: off from now on but in these phases."""
        if "freeze_model" in self.levels:
            group = self._add(module.parameters(), needed_in)
            for held in group.held:
                held.is_constant = True
            self._put_off(group)

    def add_trained(self, module: nn.Module, needed_in: Collection[str]) -> None:
        """A trained model, or a part of one: off in all phases but these, from the first on."""
        if "train_model" in self.levels:
            self._add(module.parameters(), needed_in)

    def begin(self, tracker: Tracker, optimizer: torch.optim.Optimizer) -> None:
        """What an optimiser remembers of each weight: on the device for the training alone."""
        if "optimizer" in self.levels:
            self._optimizer = optimizer

    def enter(self, phase: str) -> None:
        """Make ready for a phase."""
        self._find_optimizer_state()
        groups = [*self._groups, *([self._optimizer_group] if self._optimizer_group else [])]
        for group in groups:
            if phase not in group.needed_in:
                self._put_off(group)
        for group in groups:
            if phase in group.needed_in:
                self._bring_back(group)
        if phase == TRAIN:
            for group in groups:
                for held in group.held:
                    held.is_stored &= held.is_constant

    def close(self) -> None:
        """Forget the store; what is off stays readable."""
        self._store.close()

    def _add(self, tensors: Iterable[Tensor], needed_in: Collection[str]) -> _Group:
        known = {id(held.tensor) for group in self._groups for held in group.held}
        group = _Group(frozenset(needed_in))
        for tensor in tensors:
            # Tied weights come once, and a layout of its own would be lost in a flat file.
            if id(tensor) not in known and tensor.is_contiguous() and tensor.numel():
                name = f"{len(self._groups)}-{len(group.held)}"
                group.held.append(_Held(name, tensor, not tensor.requires_grad))
        self._groups.append(group)
        return group

    def _find_optimizer_state(self) -> None:
        """An optimiser makes its state in its first step, or takes it from a checkpoint."""
        if self._optimizer is None:
            return
        if self._optimizer_group is None:
            self._optimizer_group = _Group(frozenset({TRAIN}))
        if not self._optimizer_group.is_off:
            found = [tensor for tensor in _state_tensors(self._optimizer) if tensor.ndim]
            self._optimizer_group.held = [
                _Held(f"optimizer-{place}", tensor, False) for place, tensor in enumerate(found)
            ]

    def _put_off(self, group: _Group) -> None:
        if group.is_off:
            return
        for held in group.held:
            if held.is_stored:
                held.tensor.data = self._store.kept(held.name, held.tensor)
            else:
                held.tensor.data = self._store.put(held.name, held.tensor.data)
                self.moved_bytes += held.tensor.nbytes
                held.is_stored = True
        group.is_off = True

    def _bring_back(self, group: _Group) -> None:
        if not group.is_off:
            return
        for held in group.held:
            held.tensor.data = self._store.fetch(held.tensor.data, held.is_constant)
        group.is_off = False


def _state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                yield value
