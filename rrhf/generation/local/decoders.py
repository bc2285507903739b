"""Chooses how a model decodes: with rows that share their prompts if possible, else with plain
rows.

A self-check compares the two once for each model on a few random tokens, with everything that can
happen to rows: prompts of different lengths, several samples, a row that leaves, and a row that
joins later. A model in half precision computes in float32 for this comparison, because its rounding
would hide mistakes. A model that cannot share prompts (its attention cannot be replaced, or its
layers keep a state of their own or use position biases) fails the check; this is logged once, and
plain rows are used.

Shapes: V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rrhf.generation.local.incremental import IncrementalModel
from rrhf.generation.local.shared_prompt import SharedPromptModel, in_place
from rrhf.models.float32_mode import float32_mode
from rrhf.models.forward.onednn_linear import fast_linears
from rrhf.models.forward.packed_trunk import declared_window

logger = logging.getLogger(__name__)

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.4
"""Largest differences that pass the self-check, relative to the spread of the logits: in float32,
and, once the model has passed in float32, in half precision, where only gross errors of number
formats are looked for (a model of 30 layers differs by 0.1 from rounding alone)."""

STEPS_WORTH_PACKING = 32
"""If rows take at least this many tokens, weights are first copied into a faster layout."""


class Decoder(Protocol):
    """Runs a model one token at a time for a batch of rows; their prompts are read beforehand."""

    @property
    def can_join(self) -> bool:
        """Whether prompts may be read and rows may begin while other rows are unfinished."""

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read prompts; return their handles and the logits [B, V] of the first response token."""

    def release(self, handles: Sequence[int]) -> None:
        """Forget prompts for which no more rows will begin."""

    def arrange(self, sources: Sequence[int | None], handles: Sequence[int]) -> None:
        """Choose the rows that the next step continues or begins.

        Args:
            sources: for each row of the next step, the present row that is continued; None = a new
                row begins.
            handles: for each row of the next step, the handle of the row's prompt.
        """

    def step(self, tokens: Tensor) -> Tensor:
        """Add one token [R] to each row; return the logits [R, V] of the next token."""


@dataclass(frozen=True)
class Verdict:
    """Result of the self-check of a model.

    Attributes:
        misfit: why the model cannot share prompts; None if it can.
        window: plain rows are used if a row may become longer than this number of tokens, because
            the config states a window that the layers do not apply; None = no such limit.
    """

    misfit: str | None
    window: int | None = None


_VERDICTS: WeakKeyDictionary[Any, Verdict] = WeakKeyDictionary()


@contextmanager
def decoding(
    model: Any, pad_id: int, longest: int, num_steps: int = 0
) -> Iterator[Callable[[], Decoder]]:
    """Prepare a model for decoding; yields a function that makes the decoder of a batch.

    Args:
        model: a Hugging Face causal language model in eval mode; its weights are not changed.
        pad_id: token id for padding plain rows.
        longest: maximum number of tokens in a row, prompt included.
        num_steps: approximate number of tokens that a row will take; if it is large, weights are
            prepared for faster steps.
    """
    if model not in _VERDICTS:
        _VERDICTS[model] = verdict = _tried(model, pad_id)
        if verdict.misfit is not None:
            logger.warning(
                "generation: %s uses plain rows, because with shared prompts %s",
                type(model).__name__,
                verdict.misfit,
            )
    verdict = _VERDICTS[model]
    if verdict.misfit is None and (verdict.window is None or longest <= verdict.window):
        with in_place(model), fast_linears(model, num_steps >= STEPS_WORTH_PACKING):
            yield lambda: SharedPromptModel(model)
    else:
        yield lambda: IncrementalModel(model, pad_id)


@torch.no_grad()
def _tried(model: Any, pad_id: int) -> Verdict:
    weight = next(model.parameters())
    is_half = weight.dtype.itemsize < 4 or torch.is_autocast_enabled(weight.device.type)
    try:
        texts = _random_texts(model)
        with float32_mode(model) if is_half else fast_linears(model):
            windows, share = _difference(model, pad_id, texts)
        if is_half and share <= TOLERANCE:
            with fast_linears(model, pack=True):
                half_share = _difference(model, pad_id, texts)[1]
            share = share if half_share <= HALF_TOLERANCE else half_share
    # Any exception in the model's own code means that it cannot share prompts.
    except Exception as error:
        return Verdict(f"there is {type(error).__name__}: {error}")
    if not share <= TOLERANCE:
        return Verdict(f"logits differ by {share:.2g} of their spread")
    return Verdict(None, None if any(windows) else declared_window(model.config))


def _difference(
    model: Any, pad_id: int, texts: Sequence[Sequence[int]]
) -> tuple[set[int | None], float]:
    """Return the windows of the layers, and the largest difference between the logits of shared and
    of plain rows, as a share of the logits' spread."""
    expected = IncrementalModel(model, pad_id).read(texts)[1].float()
    with in_place(model):
        decoder = SharedPromptModel(model)
        found = _joined_on_the_way(decoder, texts).float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).clamp_min(1e-12)
    return decoder.windows, float(((found - expected).norm(dim=-1) / spread).max())


def _random_texts(model: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    size = int(model.get_input_embeddings().weight.shape[0])
    return [torch.randint(size, (length,), generator=generator).tolist() for length in (9, 7, 6)]


def _joined_on_the_way(decoder: Decoder, texts: Sequence[Sequence[int]]) -> Tensor:
    """Decode three texts, and return the logits [3, V] after each. Midway, a second row of the
    first text leaves, and the third text begins."""
    first, second, third = texts
    (one, two), begin = decoder.read([first[:5], second[:3]])
    device = begin.device
    decoder.arrange([None, None, None], [one, one, two])
    for step in range(2):
        tokens = [first[5 + step], first[step], second[3 + step]]
        decoder.step(torch.tensor(tokens, device=device))
    (three,), _ = decoder.read([third[:4]])
    decoder.arrange([0, 2, None], [one, two, three])
    for step in range(2):
        tokens = [first[7 + step], second[5 + step], third[4 + step]]
        logits = decoder.step(torch.tensor(tokens, device=device))
    return logits
