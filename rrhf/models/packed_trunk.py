"""A model's trunk on one of the faster layouts, tried on the model at hand before it is used.

A layout says how a batch passes the network: `shared_prefix` computes every prompt once through
attention of our own, `dense_mask` does the same through a mask, `rows` are padded rows. Policies
(`engines`) and reward models (`reward_engines`) go by the same ones.

`first_that_fits` tries the chosen engine on a few random tokens against padded rows: what it cannot
serve (attention that is not exchangeable, layers that carry a state along the sequence, outputs
that are shaped in a way not known here) shows there as a difference. `auto` then goes on to the
next.

Legend: N rows, M response tokens of the whole batch, T tokens of a sequence, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.models.prefix_attention import OVER, Prefix
from rrhf.models.shared_prefix import SharedPrefix, dense_mask, lay_out

logger = logging.getLogger(__name__)

Engine = Literal["auto", "shared_prefix", "dense_mask", "padded"]
ENGINES: dict[str, tuple[str, ...]] = {
    "auto": ("shared_prefix", "dense_mask", "rows"),
    "shared_prefix": ("shared_prefix",),
    "dense_mask": ("dense_mask",),
}
"""Which layouts each engine tries, in this order; `rows` is padded rows with the head in chunks."""

TOLERANCE = 1e-4
"""By how much an engine may differ from padded rows in float32, beside 1e-5 of the number."""

HIDDEN_TOLERANCE = 1e-3
"""Share of a hidden state by which it may differ: in new weights, log-probs hardly tell."""

HALF_TOLERANCE = 0.1
"""Both, for weights of half precision."""


@dataclass(frozen=True)
class Beside:
    """What an engine gives for a batch, and what padded rows give.

    Attributes:
        what: the numbers' name, for people.
        found, expected: [M] them.
        found_hidden, expected_hidden: [M, H] the hidden states that they come from.
        scale: by how much numbers of this model may differ beyond those of others.
    """

    what: str
    found: Tensor
    expected: Tensor
    found_hidden: Tensor
    expected_hidden: Tensor
    scale: float = 1.0


class PackedTrunk:
    """The part that every fast engine shares: a model's trunk on one of the layouts.

    Attributes:
        model: a Hugging Face model with a head, bare or with adapters.
        layout: `shared_prefix`, `dense_mask` or `rows`.
        window: rows beyond it go as padded rows; None = none do.
    """

    model: Any
    layout: str
    window: int | None

    def beside_padded_rows(self, batch: TokenBatch) -> Beside:
        """This engine and the reference on one batch."""
        raise NotImplementedError

    def take_layout(self, layout: str) -> None:
        """Go by a layout from now on."""
        self.layout, self.window = layout, None
        if layout == "shared_prefix":
            _exchange_attention(inner_model(self.model))
        if layout == "dense_mask":
            self.window = declared_window(inner_model(self.model).config)

    def packed(self, batch: TokenBatch, whole: bool = False) -> SharedPrefix | None:
        """The batch laid out (`lay_out`), or None where it goes as padded rows."""
        if self.layout == "rows":
            return None
        packed = lay_out(batch, whole)
        return packed if self.window is None or packed.longest <= self.window else None

    def run_packed(self, prefix: Prefix) -> Tensor:
        """[T, H] the hidden states of a sequence with shared prompts."""
        packed: SharedPrefix = prefix.layout
        arguments: dict[str, Any] = {}
        if self.layout == "shared_prefix":
            # Four dimensions are handed on as they are; nothing looks at what they hold.
            arguments["attention_mask"] = packed.ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
            arguments["shared_prefix"] = prefix
        else:
            inner = inner_model(self.model)
            is_additive = inner.config._attn_implementation == "eager"
            arguments["attention_mask"] = dense_mask(packed, is_additive, inner.dtype)
        hidden = self._trunk(input_ids=packed.ids, position_ids=packed.position_ids, **arguments)
        return hidden[0]

    def _trunk(self, **arguments: Any) -> Tensor:
        trunk = inner_model(self.model).base_model
        hidden: Tensor = trunk(**arguments, use_cache=False).last_hidden_state
        return hidden


Fast = TypeVar("Fast", bound=PackedTrunk)


def first_that_fits(
    model: Any, engine: str, make: Callable[[str], Fast], layouts: tuple[str, ...] | None = None
) -> Fast | None:
    """The first layout of an engine that serves this model, and says so; None where none does.

    Args:
        model: not yet spread over processes, where it will compute.
        engine: a key of `ENGINES`.
        make: puts the model on a layout.
        layouts: of the engine's, those that there are for this kind of model; None = all.

    Raises:
        UserError: the engine that is asked for by name does not serve this model.
    """
    failures: list[str] = []
    fast: Fast | None = None
    for layout in ENGINES[engine]:
        if layouts is not None and layout not in layouts:
            continue
        before = inner_model(model).config._attn_implementation
        try:
            fast = make(layout)
            failure = misfit(fast)
        # Whatever the model's own code makes of it, this engine is not for it.
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        if failure is None:
            break
        fast = None
        failures.append(f"{layout}: {failure}")
        if inner_model(model).config._attn_implementation != before:
            inner_model(model).set_attn_implementation(before)
    said = "; ".join(failures)
    name = type(inner_model(model)).__name__
    if failures and engine != "auto":
        raise UserError(f"--engine {engine}: does not serve {name} ({said}); use --engine auto")
    used = "padded" if fast is None else fast.layout
    used = "padded rows, head in chunks" if used == "rows" else used
    if failures:
        logger.warning("engine: %s goes by %s, since %s", name, used, said)
    else:
        logger.info("engine: %s goes by %s", name, used)
    return fast


@torch.no_grad()
def misfit(fast: PackedTrunk) -> str | None:
    """How an engine differs from padded rows on a few random tokens; None where it does not.

    For `shared_prefix` it also finds out whether the model's layers tell their sliding window;
    where the config has one and they do not, longer rows will go as padded rows.
    """
    inner = inner_model(fast.model)
    batch = _trial(inner).to(next(fast.model.parameters()).device)
    was_training = fast.model.training
    fast.model.eval()
    try:
        beside = fast.beside_padded_rows(batch)
        if fast.layout == "shared_prefix":
            prefix = Prefix(lay_out(batch))
            fast.run_packed(prefix)
            if not any(prefix.windows):
                fast.window = declared_window(inner.config)
    finally:
        fast.model.train(was_training)
    is_half = inner.dtype.itemsize < 4
    off = (beside.found - beside.expected).abs()
    allowed = TOLERANCE * beside.scale + 1e-5 * beside.expected.abs()
    if is_half:
        allowed = torch.full_like(allowed, HALF_TOLERANCE * beside.scale)
    if not bool((off <= allowed).all()):
        return f"{beside.what} differ from those of padded rows by up to {float(off.max()):.2g}"
    distance = (beside.found_hidden - beside.expected_hidden).float().norm(dim=-1)
    share = distance / beside.expected_hidden.float().norm(dim=-1).clamp_min(1e-12)
    if not bool((share <= (HALF_TOLERANCE if is_half else HIDDEN_TOLERANCE)).all()):
        return f"hidden states differ from those of padded rows by {float(share.max()):.2g} of them"
    return None


def declared_window(config: Any) -> int | None:
    """The shortest sliding window or chunk of attention that a config tells of, or None."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    slides = "sliding_attention" in kinds if kinds else getattr(text, "use_sliding_window", True)
    found = [getattr(text, "sliding_window", None)] if slides else []
    if "chunked_attention" in kinds:
        found.append(getattr(text, "attention_chunk_size", None))
    return min((window for window in found if isinstance(window, int)), default=None)


def _trial(inner: Any) -> TokenBatch:
    """A few tokens of every case: ragged, equal, alone, a response of one token, two prompts."""
    generator = torch.Generator().manual_seed(0)
    size = int(inner.get_input_embeddings().weight.shape[0])

    def ids(length: int) -> list[int]:
        return torch.randint(size, (length,), generator=generator).tolist()

    return collate(
        [
            EncodedSet(ids(6), [ids(3), ids(5), ids(1)]),
            EncodedSet(ids(4), [ids(4), ids(4)]),
            EncodedSet(ids(2), [ids(6)]),
        ],
        pad_id=0,
    )


def _exchange_attention(inner: Any) -> None:
    current = inner.config._attn_implementation
    if current in OVER.values():
        return
    if current not in OVER:
        raise NotImplementedError(f"it stands over sdpa and eager attention, not over {current}")
    inner.set_attn_implementation(OVER[current])


def inner_model(model: Any) -> Any:
    """The Hugging Face model itself, adapters or not."""
    return getattr(model, "get_base_model", lambda: model)()
