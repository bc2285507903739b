"""Faster ways through the one door, each tried on the model at hand before it is used.

An engine is how a batch passes the network: `padded` is the reference (`Policy`), `shared_prefix`
computes every prompt once through attention of our own, `dense_mask` does the same through a mask.
All of them but the reference apply the head in chunks, at response positions alone.

`build_policy` tries the chosen engine on a few random tokens against the reference: what it cannot
serve (attention that is not exchangeable, layers that carry a state along the sequence, logits that
are shaped in a way not known here) shows there as a difference. `auto` then goes on to the next.

Legend: N rows, R response tokens, M response tokens of the whole batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rrhf.data.collate import EncodedSet, TokenBatch, collate
from rrhf.errors import UserError
from rrhf.models.head import (
    CHUNK_BYTES,
    STORED_BYTES,
    TokenStatistics,
    logit_shape,
    statistics_of_logits,
    token_statistics,
)
from rrhf.models.logprobs import Policy, PolicyOutputs
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

LOGPROB_TOLERANCE = 1e-4
"""Nats by which an engine may differ from padded rows in float32, beside 1e-5 of the log-prob."""

HIDDEN_TOLERANCE = 1e-3
"""Share of a hidden state by which it may differ: in new weights, log-probs hardly tell."""

HALF_TOLERANCE = 0.1
"""Both, for weights of half precision."""


class FastPolicy(Policy):
    """A causal language model behind the one door, by one of the faster layouts.

    Args:
        model: a Hugging Face causal language model, bare or with adapters. Its attention
            implementation is exchanged for good where the layout is `shared_prefix`.
        layout: `shared_prefix`, `dense_mask` or `rows`.
        temperature, with_entropy, with_mean_logprobs, entropy_has_gradient: as in `Policy`.
    """

    def __init__(
        self,
        model: Any,
        layout: str,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_mean_logprobs: bool = False,
        entropy_has_gradient: bool = True,
    ) -> None:
        super().__init__(model, temperature, with_entropy, with_mean_logprobs, entropy_has_gradient)
        self.layout = layout
        self.shape = logit_shape(_inner(model).config, temperature)
        self.window: int | None = None  # rows beyond it go as padded rows
        if layout == "shared_prefix":
            _exchange_attention(_inner(model))
        if layout == "dense_mask":
            self.window = declared_window(_inner(model).config)

    def forward(self, batch: TokenBatch) -> PolicyOutputs:
        """Log-probs of every response token of the batch."""
        hidden, row, column = self._hidden(batch)
        return self._outputs(hidden, row, column, batch)

    def with_hidden(self, batch: TokenBatch) -> tuple[PolicyOutputs, Tensor]:
        """As `Policy.with_hidden`."""
        hidden, row, column = self._hidden(batch)
        grid = hidden.new_zeros((*batch.response_ids.shape, hidden.shape[-1]))
        outputs = self._outputs(hidden, row, column, batch)
        return outputs, grid.index_put((row, column), hidden)

    def _hidden(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] the hidden states that predict the response tokens, and where these stand."""
        if self.layout != "rows":
            packed = lay_out(batch)
            if self.window is None or packed.longest <= self.window:
                hidden = self.run_packed(Prefix(packed))
                return hidden[packed.predicted_from], packed.row, packed.column
        ids, mask, position_ids = (whole[:, :-1] for whole in batch.full_rows())
        hidden = self._trunk(input_ids=ids, attention_mask=mask, position_ids=position_ids)
        row, column = batch.response_mask.nonzero(as_tuple=True)
        return hidden[:, -batch.response_ids.shape[1] :][row, column], row, column

    def run_packed(self, prefix: Prefix) -> Tensor:
        """[T, H] the hidden states of a sequence with shared prompts."""
        packed: SharedPrefix = prefix.layout
        arguments: dict[str, Any] = {}
        if self.layout == "shared_prefix":
            # Four dimensions are handed on as they are; nothing looks at what they hold.
            arguments["attention_mask"] = packed.ids.new_ones((1, 1, 1, 1), dtype=torch.bool)
            arguments["shared_prefix"] = prefix
        else:
            inner = _inner(self.model)
            is_additive = inner.config._attn_implementation == "eager"
            arguments["attention_mask"] = dense_mask(packed, is_additive, inner.dtype)
        hidden = self._trunk(input_ids=packed.ids, position_ids=packed.position_ids, **arguments)
        return hidden[0]

    def _trunk(self, **arguments: Any) -> Tensor:
        hidden: Tensor = (
            _inner(self.model).base_model(**arguments, use_cache=False).last_hidden_state
        )
        return hidden

    def _outputs(
        self, hidden: Tensor, row: Tensor, column: Tensor, batch: TokenBatch
    ) -> PolicyOutputs:
        found = self._statistics(hidden, batch.response_ids[row, column])
        grid = found.logprobs.new_zeros(batch.response_ids.shape)

        def placed(values: Tensor | None) -> Tensor | None:
            return None if values is None else grid.index_put((row, column), values)

        return PolicyOutputs(
            grid.index_put((row, column), found.logprobs),
            placed(found.mean_logprobs),
            placed(found.entropy),
        )

    def _statistics(self, hidden: Tensor, targets: Tensor) -> TokenStatistics:
        head = _inner(self.model).get_output_embeddings()
        asked = (self.with_entropy, self.with_mean_logprobs)
        if not _is_plain(head):
            return statistics_of_logits(
                head(hidden), targets, self.shape, *asked, self.entropy_has_gradient
            )
        # Who saves memory on activations does not want it back as logits.
        saves = _is_checkpointing(_inner(self.model))
        stored = 0 if saves else STORED_BYTES
        chunk = CHUNK_BYTES // 4 if saves else CHUNK_BYTES
        return token_statistics(
            hidden, head, targets, self.shape, *asked, stored, chunk, self.entropy_has_gradient
        )


def build_policy(
    model: Any,
    engine: str = "padded",
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_mean_logprobs: bool = False,
    entropy_has_gradient: bool = True,
) -> Policy:
    """The policy on the engine that is asked for, tried on this very model.

    Args:
        model: not yet spread over processes, where it will compute.
        engine: `padded`; `shared_prefix` or `dense_mask`; `auto` = the first that serves the model.
        temperature, with_entropy, with_mean_logprobs, entropy_has_gradient: as in `Policy`.

    Raises:
        UserError: the engine that is asked for by name does not serve this model.
    """
    asked = (temperature, with_entropy, with_mean_logprobs, entropy_has_gradient)
    if engine == "padded":
        return Policy(model, *asked)
    failures: list[str] = []
    for layout in ENGINES[engine]:
        before = _inner(model).config._attn_implementation
        try:
            policy = FastPolicy(model, layout, *asked)
            failure = misfit(policy)
        # Whatever the model's own code makes of it, this engine is not for it.
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        if failure is None:
            break
        failures.append(f"{layout}: {failure}")
        if _inner(model).config._attn_implementation != before:
            _inner(model).set_attn_implementation(before)
    else:
        policy = None
    said = "; ".join(failures)
    name = type(_inner(model)).__name__
    if failures and engine != "auto":
        raise UserError(f"--engine {engine}: does not serve {name} ({said}); use --engine auto")
    used = "padded" if policy is None else policy.layout
    used = "padded rows, head in chunks" if used == "rows" else used
    if failures:
        logger.warning("engine: %s goes by %s, since %s", name, used, said)
    else:
        logger.info("engine: %s goes by %s", name, used)
    return Policy(model, *asked) if policy is None else policy


@torch.no_grad()
def misfit(policy: FastPolicy) -> str | None:
    """How a policy differs from padded rows on a few random tokens; None where it does not.

    For `shared_prefix` it also finds out whether the model's layers tell their sliding window;
    where the config has one and they do not, longer rows will go as padded rows.
    """
    inner = _inner(policy.model)
    batch = _trial(inner).to(next(policy.parameters()).device)
    was_training = policy.model.training
    policy.model.eval()
    try:
        expected, expected_hidden = Policy.with_hidden(policy, batch)
        found, hidden = policy.with_hidden(batch)
        if policy.layout == "shared_prefix":
            prefix = Prefix(lay_out(batch))
            policy.run_packed(prefix)
            if not any(prefix.windows):
                policy.window = declared_window(inner.config)
    finally:
        policy.model.train(was_training)
    is_half = inner.dtype.itemsize < 4
    mask = batch.response_mask
    off = (found.logprobs - expected.logprobs)[mask].abs()
    allowed = LOGPROB_TOLERANCE + 1e-5 * expected.logprobs[mask].abs()
    if is_half:
        allowed = torch.full_like(allowed, HALF_TOLERANCE)
    if not bool((off <= allowed).all()):
        return f"log-probs differ from those of padded rows by up to {float(off.max()):.2g} nats"
    distance = (hidden - expected_hidden)[mask].float().norm(dim=-1)
    share = distance / expected_hidden[mask].float().norm(dim=-1).clamp_min(1e-12)
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


def _inner(model: Any) -> Any:
    """The causal language model, adapters or not."""
    return getattr(model, "get_base_model", lambda: model)()


def _is_checkpointing(inner: Any) -> bool:
    name = "is_activation_checkpointing"  # the newer name in transformers
    return bool(getattr(inner, name if hasattr(type(inner), name) else "is_gradient_checkpointing"))


def _is_plain(head: nn.Module) -> bool:
    """A linear layer whose weights may be read here, and not only inside its own forward."""
    is_watched = bool(head._forward_pre_hooks or head._forward_hooks)
    return type(head) is nn.Linear and not is_watched and not hasattr(head.weight, "ds_id")
