"""Chooses the prompts of each optimiser step, reproducibly for any number of processes.

A stream yields the micro-batches of one optimiser step at a time. The order of the prompts in an
epoch depends only on the seed and the epoch. A global batch is cut into micro-batches by number of
prompts or by tokens. All ranks run the same number of micro-batches; a rank that runs out of
prompts repeats one with weight zero.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, overload, runtime_checkable

import torch
from torch import Tensor

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.progress import tracked
from rrhf.records import CandidateSet
from rrhf.training.core.token_batches import (
    PADDED,
    Size,
    SizeTable,
    TokenBudget,
    describe_cut,
    even_batches,
    micro_batches,
    sizes_of,
    tokens_of,
)

logger = logging.getLogger(__name__)

GROUPING_STEPS = 32
"""Number of steps whose prompts are sorted by length together under `group_by_length`."""


class UpdateStream(Protocol):
    """Yields the micro-batches of each optimiser step."""

    total_steps: int

    def __iter__(self) -> Iterator[list[TokenBatch]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class LiveStream(UpdateStream, Protocol):
    """A stream that generates its data during training."""

    def tensors(self) -> dict[str, Tensor]:
        """Return tensors for a checkpoint, in addition to `state_dict`; the same on every rank."""
        ...

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore the tensors of a checkpoint; called after `load_state_dict`."""
        ...

    def take_news(self) -> dict[str, float]:
        """Return the metrics of newly generated data for the log, each only once."""
        ...


class EncodedExamples(Sequence[EncodedSet]):
    """Candidate sets that are encoded when used, so that a large file need not fit in memory.

    A first pass encodes every set to find out which sets yield an example, and how long each
    example is. If `yields` is given, this pass encodes nothing, and the lengths remain unknown.

    Args:
        sets: random access to candidate sets.
        encode: returns a set's example, or None if the set yields no example (the encoder counts
            the reasons).
        yields: returns whether a set yields an example, without encoding the set.
        identity: identifies the data, so that a resumed run notices if the data changed.

    Attributes:
        lengths: number of tokens of each example as padded rows; None with `yields`.
        sizes: numbers of prompt and response tokens of each example; None with `yields`.
        ids_sha256: a hash of the ids of all examples; "" with `yields`.

    Raises:
        UserError: no set yields an example.
    """

    def __init__(
        self,
        sets: Sequence[CandidateSet],
        encode: Callable[[CandidateSet], EncodedSet | None],
        yields: Callable[[CandidateSet], bool] | None = None,
        identity: str | None = None,
    ) -> None:
        self._sets = sets
        self._encode = encode
        self._places = array("Q")
        self.lengths: array[int] | None = None if yields else array("Q")
        self.sizes: SizeTable | None = None if yields else SizeTable()
        self.identity = identity
        digest = hashlib.sha256()
        work = "check" if yields else "encode"
        for place, candidate_set in enumerate(tracked(sets, work, "prompt")):
            if yields is not None:
                if yields(candidate_set):
                    self._places.append(place)
            elif (example := encode(candidate_set)) is not None:
                assert self.lengths is not None and self.sizes is not None
                self._places.append(place)
                self.lengths.append(example.num_tokens)
                self.sizes.append(example)
                digest.update(example.packed_ids())
        self.ids_sha256 = "" if yields else digest.hexdigest()
        if not self._places:
            raise UserError(f"none of the {len(sets)} prompts yields a training example")

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> EncodedSet: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedSet]: ...
    def __getitem__(self, index: int | slice) -> EncodedSet | list[EncodedSet]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._encode(self._sets[self._places[index]])
        assert example is not None, "a set that yielded an example before must yield one each time"
        return example


@dataclass(frozen=True)
class StepCut:
    """The size of an optimiser step, and how it is cut into micro-batches for the ranks.

    Attributes:
        pad_id: token id for padding.
        per_device_train_batch_size: examples per micro-batch.
        gradient_accumulation_steps: micro-batches per step and rank. With a budget, their number
            and size vary, but the number of examples in a step stays the same.
        rank, world_size: index of this process, and number of processes.
        budget: if given, steps are cut by tokens instead of by number of examples.
    """

    pad_id: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int = 1
    rank: int = 0
    world_size: int = 1
    budget: TokenBudget | None = None

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if (value := getattr(self, name)) < 1:
                raise UserError(f"--{name} {value}: must be 1 or more")

    @property
    def global_batch_size(self) -> int:
        """Number of examples in a step, over all ranks."""
        mine = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return mine * self.world_size

    @property
    def max_tokens(self) -> int | None:
        """The budget in tokens; None if there is no budget."""
        return None if self.budget is None else self.budget.tokens

    def batches(
        self,
        examples: Sequence[EncodedSet],
        indices: Sequence[int],
        size_of: Callable[[int], Size],
        filler: Callable[[], int],
    ) -> list[TokenBatch]:
        """Return this rank's micro-batches of a step; every rank gets the same number of them.

        Args:
            examples: all examples of the run.
            indices: the indices of the step's examples.
            size_of: returns the size of the example at an index; used only with a budget.
            filler: returns the index of the example that fills a rank's empty micro-batches, with
                weight zero.
        """
        if self.budget is None:
            count, size = len(indices), self.per_device_train_batch_size
            cut = even_batches(count, size, self.world_size)
        else:
            cut = micro_batches([size_of(i) for i in indices], self.budget, self.world_size)
        batches = []
        for places in cut[self.rank]:
            mine = [examples[indices[place]] for place in places]
            if not mine:
                mine = [replace(examples[filler()], weight=0.0)]
            batches.append(collate(mine, self.pad_id))
        return batches

    def describe(self, sizes: Sequence[Size]) -> str:
        """Describe how the budget cuts a step of examples with these sizes."""
        assert self.budget is not None, "there is no budget"
        return describe_cut(micro_batches(sizes, self.budget, self.world_size), sizes, self.budget)


class OfflineStream:
    """Yields the steps of one or more passes over a fixed set of examples.

    Args:
        examples: the training examples; their attribute `lengths`, if present, is used to group
            them by length.
        cut: how each step is cut into micro-batches.
        num_train_epochs: number of passes, fractions allowed.
        max_steps: number of optimiser steps; -1 = `num_train_epochs` determines it.
        seed: seed of the order.
        group_by_length: sort prompts by length within groups of `GROUPING_STEPS` steps.
    """

    def __init__(
        self,
        examples: Sequence[EncodedSet],
        cut: StepCut,
        num_train_epochs: float = 1.0,
        max_steps: int = -1,
        seed: int = 0,
        group_by_length: bool = False,
    ) -> None:
        if max_steps <= 0 and num_train_epochs <= 0:
            raise UserError(
                f"--num_train_epochs {num_train_epochs}: must be above 0, or set --max_steps"
            )
        self._examples, self._cut, self._seed = examples, cut, seed
        self.global_batch_size = cut.global_batch_size
        self._group_by_length = group_by_length
        self.steps_per_epoch = math.ceil(len(examples) / self.global_batch_size)
        by_epochs = math.ceil(num_train_epochs * self.steps_per_epoch)
        self.total_steps = max_steps if max_steps > 0 else max(by_epochs, 1)
        self._step = 0

    def __iter__(self) -> Iterator[list[TokenBatch]]:
        indices_of: Callable[[int], list[int]] | None = None
        while self._step < self.total_steps:
            epoch, place = divmod(self._step, self.steps_per_epoch)
            if place == 0 or indices_of is None:
                indices_of = self._epoch_order(epoch)
            self._step += 1
            yield self._micro_batches(indices_of(place))

    @functools.cached_property
    def _lengths(self) -> Sequence[int]:
        """The number of tokens in each example."""
        known = getattr(self._examples, "lengths", None)
        return known or [example.num_tokens for example in self._examples]

    @property
    def _knows_lengths(self) -> bool:
        """Whether the lengths are available without a pass that encodes every example."""
        return getattr(self._examples, "lengths", ()) is not None

    @functools.cached_property
    def _sizes(self) -> Sequence[Size]:
        return sizes_of(self._examples)

    @functools.cached_property
    def _lengths_digest(self) -> str:
        """A digest of the lengths; it detects other data that has the same number of examples."""
        return hashlib.sha256(" ".join(map(str, self._lengths)).encode()).hexdigest()

    def indices(self) -> Sequence[int]:
        """Return the indices of the examples that the steps use, ascending."""
        if self.total_steps >= self.steps_per_epoch:
            return range(len(self._examples))
        of_step = self._epoch_order(0)
        return sorted(i for step in range(self.total_steps) for i in of_step(step))

    def over(self, examples: Sequence[EncodedSet]) -> Self:
        """Return a stream of the same steps over examples with the same ids and more numbers."""
        stream = copy.copy(self)
        stream._examples = examples
        return stream

    def describe(self) -> str:
        """Describe how the budget cuts the first step."""
        return self._cut.describe([self._sizes[i] for i in self._epoch_order(0)(0)])

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the data, and the settings on which the order of the data
        depends."""
        return {
            "step": self._step,
            "examples": len(self._examples),
            "examples_identity": getattr(self._examples, "identity", None),
            "lengths_sha256": self._lengths_digest if self._knows_lengths else None,
            "global_batch_size": self.global_batch_size,
            "world_size": self._cut.world_size,
            "seed": self._seed,
            "group_by_length": self._group_by_length,
            "max_tokens_per_batch": self._cut.max_tokens,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the saved step.

        Raises:
            UserError: the data, the seed, the global batch size, the number of processes or
                `group_by_length` changed. The token budget may change, because a step keeps its
                prompts.
        """
        mine = self.state_dict()
        # Checkpoints of earlier versions do not record `group_by_length`.
        state = {"group_by_length": self._group_by_length, **state}
        for name in ("examples", "global_batch_size", "world_size", "seed", "group_by_length"):
            if state[name] != mine[name]:
                raise UserError(
                    f"resume: {name} was {state[name]} in the checkpoint and is {mine[name]} now; "
                    "use the value of the checkpoint"
                )
        if self._is_of_others(state, mine):
            raise UserError(
                f"resume: the {mine['examples']} training examples are not those of the "
                "checkpoint (their rows or lengths differ); start with the data, the tokenizer and "
                "the length limits of the earlier run"
            )
        self._step = int(state["step"])

    def _is_of_others(self, state: dict[str, Any], mine: dict[str, Any]) -> bool:
        """Whether a checkpoint was written for other examples; False if unknown."""
        lengths, identity = state.get("lengths_sha256"), state.get("examples_identity")
        if not (lengths and self._knows_lengths) and identity and mine["examples_identity"]:
            return identity != mine["examples_identity"]
        return lengths is not None and lengths != self._lengths_digest

    def _epoch_order(self, epoch: int) -> Callable[[int], list[int]]:
        """Return a function from the number of a step in an epoch to the indices of its
        examples."""
        shuffle = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        shuffled = torch.randperm(len(self._examples), generator=shuffle)
        size = self.global_batch_size
        if not self._group_by_length:  # a tensor takes less memory than lists
            return lambda step: shuffled[step * size : (step + 1) * size].tolist()
        order = shuffled.tolist()
        steps: list[list[int]] = []
        for start in range(0, len(order), size * GROUPING_STEPS):
            lengths = self._lengths
            stretch = sorted(order[start : start + size * GROUPING_STEPS], key=lambda i: lengths[i])
            batches = [stretch[i : i + size] for i in range(0, len(stretch), size)]
            places = torch.randperm(len(batches), generator=shuffle).tolist()
            steps += [batches[i] for i in places]
        return steps.__getitem__

    def _micro_batches(self, indices: Sequence[int]) -> list[TokenBatch]:
        def filler() -> int:
            if self._cut.budget is None:
                return indices[0]
            return min(indices, key=lambda i: tokens_of([self._sizes[i]], PADDED))

        return self._cut.batches(self._examples, indices, lambda i: self._sizes[i], filler)
