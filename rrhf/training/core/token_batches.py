"""Cuts a step into micro-batches by tokens, so that long and short prompts fill a device equally.

This module does not choose the prompts of a step. The cut depends only on their sizes, so all ranks
and resumed runs compute the same cut. Losses are divided by counts that are known beforehand, so
every cut gives the same update, up to rounding.

The cost of a batch depends on the layout. With padded rows, the cost is rows times width: prompts
are sorted so that similar prompts are neighbours, and the sorted list is cut into batches. With
shared prompts or packed rows, the cost is the sum of tokens: starting with the largest, each prompt
is added to the fullest batch that has room (best fit, at most 11/9 of the smallest number of
batches). In both cases the budget is then lowered as long as this needs no further batch, and the
best result is kept (the idea of MULTIFIT, Coffman, Garey and Johnson 1978), so that ranks get about
the same work. All ranks run the same number of micro-batches; if some are missing, the largest
batches are cut in two.
"""

from __future__ import annotations

import bisect
import logging
import math
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

from torch import nn

from rrhf.data.collate import EncodedSet
from rrhf.models.forward.logprobs import Policy
from rrhf.models.reward_model import RewardModel

logger = logging.getLogger(__name__)

SHARED, PACKED, PADDED = "shared", "packed", "padded"
"""Layouts: SHARED = each prompt once; PACKED = rows with their prompts, end to end; PADDED = rows
padded to the longest row."""

STRIPS = (1, 2, 3, 4, 6, 8)
"""Numbers of strips that are tried when padded prompts are sorted."""

_LAYOUTS = {
    "shared_prefix": SHARED,
    "varlen_attention": SHARED,
    "flex_attention": SHARED,
    "dense_mask": SHARED,
    "packed": PACKED,
}


@dataclass(frozen=True)
class Size:
    """The size of one prompt with its responses.

    Attributes:
        prompt: number of tokens in the prompt.
        responses: number of tokens in each response.
        same_prompt: a key that sets with the same prompt share; None = no other set has this
            prompt.
    """

    prompt: int
    responses: tuple[int, ...]
    same_prompt: Hashable = None

    @classmethod
    def of(cls, example: EncodedSet, same_prompt: Hashable = None) -> Size:
        responses = tuple(len(ids) for ids in example.response_ids)
        return cls(len(example.prompt_ids), responses, same_prompt)


@dataclass(frozen=True)
class TokenBudget:
    """The largest cost of a micro-batch.

    Attributes:
        tokens: largest number of tokens that the model computes; a prompt with more tokens forms
            its own micro-batch.
        layout: `SHARED`, `PACKED` or `PADDED`.
    """

    tokens: int
    layout: str = PADDED


class SizeTable(Sequence[Size]):
    """A sequence of sizes that takes little memory."""

    def __init__(self) -> None:
        self._prompts, self._responses = array("I"), array("I")
        self._ends = array("Q")

    def append(self, example: EncodedSet) -> None:
        """Add the size of an example."""
        self._prompts.append(len(example.prompt_ids))
        self._responses.extend(len(ids) for ids in example.response_ids)
        self._ends.append(len(self._responses))

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Size: ...
    @overload
    def __getitem__(self, index: slice) -> list[Size]: ...
    def __getitem__(self, index: int | slice) -> Size | list[Size]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self._ends[index - 1] if index else 0
        return Size(self._prompts[index], tuple(self._responses[first : self._ends[index]]))


def layout_of(root: nn.Module, longest: int) -> str:
    """Return the layout that determines a batch's cost: the most expensive of all parts of a model.

    Args:
        root: a policy, a reward model, or a module that holds several of them.
        longest: length of the longest possible row; a part whose window is shorter uses padded
            rows.
    """
    ways = set()
    for part in root.modules():
        if isinstance(part, (Policy, RewardModel)):
            window = getattr(part, "window", None)
            goes_back = window is not None and longest > window
            way = _LAYOUTS.get(getattr(part, "layout", PADDED), PADDED)
            ways.add(PADDED if goes_back else way)
    return next((way for way in (PADDED, PACKED, SHARED) if way in ways), PADDED)


def tokens_of(sizes: Iterable[Size], layout: str) -> int:
    """Return the number of tokens that a model computes for a batch of these sizes, in a layout.

    The last token of a response counts too, although nothing is predicted from it.
    """
    sizes = list(sizes)
    if not sizes:
        return 0
    rows = sum(len(size.responses) for size in sizes)
    if layout == PADDED:
        longest = max(max(size.responses) for size in sizes)
        return rows * (max(size.prompt for size in sizes) + longest)
    written = sum(sum(size.responses) for size in sizes)
    if layout == PACKED:
        return written + sum(size.prompt * len(size.responses) for size in sizes)
    alone = sum(size.prompt for size in sizes if size.same_prompt is None)
    shared = {size.same_prompt: size.prompt for size in sizes if size.same_prompt is not None}
    return written + alone + sum(shared.values())


def sizes_of(examples: Sequence[EncodedSet]) -> Sequence[Size]:
    """Return the sizes of examples: their attribute `sizes`, or computed if they have none."""
    known: Sequence[Size] | None = getattr(examples, "sizes", None)
    return [Size.of(example) for example in examples] if known is None else known


def warn_of_lone(sizes: Sequence[Size], budget: TokenBudget, what: str = "prompts") -> bool:
    """Warn of prompts that exceed the budget on their own; return whether there are any."""
    costs = (tokens_of([size], budget.layout) for size in sizes)
    beyond = [cost for cost in costs if cost > budget.tokens]
    if beyond:
        logger.warning(
            "--max_tokens_per_batch %d: %d of %d %s have more tokens than that (up to %d); "
            "each of them forms its own micro-batch",
            budget.tokens,
            len(beyond),
            len(sizes),
            what,
            max(beyond),
        )
    return bool(beyond)


def describe_cut(
    cut: Sequence[Sequence[Sequence[int]]], sizes: Sequence[Size], budget: TokenBudget
) -> str:
    """Describe how a step was cut, with figures that help in choosing a budget."""
    batches = [[sizes[place] for place in places] for rank in cut for places in rank if places]
    computed = [tokens_of(batch, budget.layout) for batch in batches]
    needed = sum(computed)
    if budget.layout == PADDED:
        needed = sum(tokens_of(batch, PACKED) for batch in batches)
    return (
        f"{len(cut[0])} micro-batches a device, {sum(computed) // max(len(batches), 1)} tokens "
        f"each (at most {max(computed, default=0)}), {1 - needed / max(sum(computed), 1):.0%} of "
        "them padding"
    )


def even_batches(count: int, per_device: int, world_size: int = 1) -> list[list[list[int]]]:
    """Cut a step by number of prompts, in their order; return what `micro_batches` returns."""
    width = per_device * world_size
    places = list(range(count))
    return [
        [
            places[start + rank * per_device : start + (rank + 1) * per_device]
            for start in range(0, max(count, 1), width)
        ]
        for rank in range(world_size)
    ]


def micro_batches(
    sizes: Sequence[Size], budget: TokenBudget, world_size: int = 1
) -> list[list[list[int]]]:
    """Cut a step by tokens.

    Args:
        sizes: sizes of the step's prompts (or of rows, each with its prompt).
        budget: the largest cost of a micro-batch.
        world_size: ranks that share the step.

    Returns:
        [rank][micro-batch] indices into `sizes`, ascending. Every rank gets the same number of
        micro-batches, the largest first, so that all ranks compute micro-batches of about the same
        size at the same time. Some are empty if there are fewer prompts than micro-batches.
    """

    if budget.layout != SHARED:
        sizes = [replace(size, same_prompt=None) for size in sizes]

    def cost(places: Sequence[int]) -> int:
        return tokens_of((sizes[place] for place in places), budget.layout)

    way = _padded_fill if budget.layout == PADDED else _fitting_fill
    fill = way(sizes, cost, budget.tokens)
    bins = fill(budget.tokens)
    wanted = math.ceil(max(len(bins), 1) / world_size) * world_size
    alone = (cost([place]) for place in range(len(sizes)))
    low, high = max((c for c in alone if c <= budget.tokens), default=budget.tokens), budget.tokens
    while low < high:
        middle = (low + high) // 2
        tried = fill(middle)
        low, high = (low, middle) if len(tried) <= wanted else (middle + 1, high)
        if len(tried) <= wanted:
            bins = min(tried, bins, key=lambda bins: _time(bins, cost, world_size))
    while len(bins) < wanted and (several := [b for b in bins if len(b) > 1]):
        largest = max(several, key=cost)
        bins.remove(largest)
        bins += _halves(largest, sizes, cost)
    bins = sorted((sorted(b) for b in bins), key=lambda b: (-cost(b), b))
    bins += [[] for _ in range(wanted - len(bins))]
    rounds = [bins[i : i + world_size] for i in range(0, wanted, world_size)]
    # The first rank gets the largest batch of one round, the last rank that of the next round.
    turned = [bins if number % 2 == 0 else bins[::-1] for number, bins in enumerate(rounds)]
    return [[bins[rank] for bins in turned] for rank in range(world_size)]


_Cost = Callable[[Sequence[int]], int]
_Fill = Callable[[int], list[list[int]]]


def _padded_fill(sizes: Sequence[Size], cost: _Cost, budget: int) -> _Fill:
    """Return a function that cuts the prompts into batches, in the order that needs least
    padding."""
    prompts = [size.prompt for size in sizes]
    longest = [max(size.responses) for size in sizes]
    rows = [len(size.responses) for size in sizes]

    def cut(order: Sequence[int], limit: int) -> list[list[int]]:
        bins: list[list[int]] = []
        prompt = response = count = 0
        for place in order:
            prompt, response = max(prompt, prompts[place]), max(response, longest[place])
            count += rows[place]
            if not bins or count * (prompt + response) > limit:
                bins.append([])
                prompt, response, count = prompts[place], longest[place], rows[place]
            bins[-1].append(place)
        return bins

    order = min(_orders(prompts, longest), key=lambda order: sum(map(cost, cut(order, budget))))
    return lambda limit: cut(order, limit)


def _orders(prompts: Sequence[int], longest: Sequence[int]) -> Iterator[list[int]]:
    """Yield orders of the prompts that put similar ones next to each other.

    The first is by the longest row. The others sort by one length (prompt or response), cut the
    result into strips, and sort each strip by the other length, in alternating direction.
    """
    count = len(prompts)
    yield sorted(range(count), key=lambda place: -(prompts[place] + longest[place]))
    for first, second in ((prompts, longest), (longest, prompts)):
        by_first = sorted(range(count), key=lambda place: -first[place])
        for strips in STRIPS:
            width = math.ceil(count / strips)
            order: list[int] = []
            for number, start in enumerate(range(0, count, max(width, 1))):
                sign = -1 if number % 2 == 0 else 1
                strip = by_first[start : start + width]
                order += sorted(strip, key=lambda place: sign * second[place])
            yield order


def _fitting_fill(sizes: Sequence[Size], cost: _Cost, budget: int) -> _Fill:
    """Return a function that fills batches by best fit; the rows of a prompt stay together if they
    fit."""
    whole = [(cost(places), places) for places in _by_prompt(range(len(sizes)), sizes)]

    def fill(limit: int) -> list[list[int]]:
        parts: list[tuple[int, list[int]]] = []
        for tokens, places in whole:
            pieces = [places] if tokens <= limit else _pieces(places, sizes, limit)
            parts += [(tokens if len(pieces) == 1 else cost(piece), piece) for piece in pieces]
        bins: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (tokens left, index of the bin), ascending
        for tokens, places in sorted(parts, key=lambda part: (-part[0], part[1])):
            found = bisect.bisect_left(room, (tokens, -1))
            if found < len(room):
                left, number = room.pop(found)
            else:
                left, number = limit, len(bins)
                bins.append([])
            bins[number] += places
            if left > tokens:
                bisect.insort(room, (left - tokens, number))
        return bins

    return fill


def _pieces(places: Sequence[int], sizes: Sequence[Size], limit: int) -> list[list[int]]:
    """Cut the rows of one prompt into few pieces, by first fit, the longest rows first."""
    pieces: list[list[int]] = []
    taken: list[int] = []
    for place in sorted(places, key=lambda place: (-sum(sizes[place].responses), place)):
        own = sum(sizes[place].responses)
        number = next((n for n, used in enumerate(taken) if used + own <= limit), len(pieces))
        if number == len(pieces):
            pieces.append([])
            taken.append(sizes[place].prompt)
        pieces[number].append(place)
        taken[number] += own
    return pieces


def _time(bins: Sequence[Sequence[int]], cost: _Cost, world_size: int) -> tuple[int, int]:
    """Return a key to compare cuts: the sum over rounds of the largest batch's tokens, then the
    tokens of the largest batch of all."""
    costs = sorted(map(cost, bins), reverse=True)
    return sum(costs[::world_size]), costs[0]


def _halves(places: Sequence[int], sizes: Sequence[Size], cost: _Cost) -> list[list[int]]:
    """Cut a batch into halves; the rows of a prompt are separated only if necessary."""
    parts = _by_prompt(places, sizes)
    if len(parts) == 1:
        parts = [[place] for place in places]
    halves: list[list[int]] = [[], []]
    for part in sorted(parts, key=lambda part: (-cost(part), part)):
        min(halves, key=cost).extend(part)
    return halves


def _by_prompt(places: Iterable[int], sizes: Sequence[Size]) -> list[list[int]]:
    """Group rows by prompt, in the order in which the prompts first occur."""
    found: dict[Hashable, list[int]] = {}
    for place in places:
        key = sizes[place].same_prompt
        found.setdefault(("alone", place) if key is None else ("prompt", key), []).append(place)
    return list(found.values())
