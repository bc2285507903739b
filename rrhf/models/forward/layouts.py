"""Faster layouts behind the policies' forward interface.

A layout is how a batch passes the network. `padded` is the reference (`Policy`); the others are
those of `packed_trunk`, and each is checked on the model before use. All layouts except the
reference apply the head in chunks, at response positions only.

Legend: N rows, R response tokens, M response tokens of the whole batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rrhf.data.collate import TokenBatch
from rrhf.models.forward.head import (
    CHUNK_BYTES,
    STORED_BYTES,
    TokenStatistics,
    statistics_of_logits,
    token_statistics,
)
from rrhf.models.forward.logit_shape import logit_shape
from rrhf.models.forward.logprobs import PLAIN, LogprobOptions, Policy, PolicyOutputs, inner_model
from rrhf.models.forward.onednn_linear import OneDnnLinear
from rrhf.models.forward.packed_trunk import Beside, PackedTrunk, is_checkpointing
from rrhf.models.forward.prefix_attention import Prefix
from rrhf.models.forward.self_check import first_that_fits


class FastPolicy(PackedTrunk, Policy):
    """A policy on one of the faster layouts.

    Args:
        model: a Hugging Face causal language model, bare or with adapters. Its attention
            implementation is exchanged for good where the layout has attention of its own.
        layout: as in `PackedTrunk`.
        options: as in `Policy`.
    """

    def __init__(self, model: Any, layout: str, options: LogprobOptions = PLAIN) -> None:
        super().__init__(model, options)
        self.shape = logit_shape(inner_model(model).config, options.temperature)
        self.take_layout(layout)

    def forward(self, batch: TokenBatch) -> PolicyOutputs:
        """Log-probs of every response token of the batch."""
        hidden, row, column = self._hidden(batch)
        return self._outputs(hidden, row, column, batch)

    def with_hidden(self, batch: TokenBatch) -> tuple[PolicyOutputs, Tensor]:
        """As `Policy.with_hidden`."""
        hidden, row, column = self._hidden(batch)
        outputs = self._outputs(hidden, row, column, batch)
        return outputs, _as_grid(hidden, row, column, batch)

    def hidden(self, batch: TokenBatch) -> Tensor:
        """As `Policy.hidden`, without the head."""
        return _as_grid(*self._hidden(batch), batch)

    def _hidden(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """[M, H] the hidden states that predict the response tokens, and their places."""
        packed = self.packed(batch)
        if packed is not None:
            hidden = self.run_packed(Prefix(packed))
            return hidden[packed.predicted_from], packed.row, packed.column
        ids, mask, position_ids = (whole[:, :-1] for whole in batch.full_rows())
        hidden = self._trunk(input_ids=ids, attention_mask=mask, position_ids=position_ids)
        row, column = batch.response_mask.nonzero(as_tuple=True)
        return hidden[:, -batch.response_ids.shape[1] :][row, column], row, column

    def beside_padded_rows(self, batch: TokenBatch) -> Beside:
        expected, expected_hidden = Policy.with_hidden(self, batch)
        found, hidden = self.with_hidden(batch)
        mask = batch.response_mask
        return Beside(
            "log-probs",
            found.logprobs[mask],
            expected.logprobs[mask],
            hidden[mask],
            expected_hidden[mask],
        )

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
        head = inner_model(self.model).get_output_embeddings()
        if not _is_plain(head):
            return statistics_of_logits(head(hidden), targets, self.shape, self.options)
        # With activation checkpointing, memory is not spent on logits either.
        saves = is_checkpointing(inner_model(self.model))
        stored = 0 if saves else STORED_BYTES
        chunk = CHUNK_BYTES // 4 if saves else CHUNK_BYTES
        return token_statistics(hidden, head, targets, self.shape, self.options, stored, chunk)


def build_policy(model: Any, layout: str = "padded", options: LogprobOptions = PLAIN) -> Policy:
    """The policy on the given layout, after a self-check on this model.

    Args:
        model: not yet spread over processes, where it will compute.
        layout: `padded`; `shared_prefix`, `varlen_attention`, `flex_attention` or `dense_mask`;
            `auto` = the first that supports the model.
        options: as in `Policy`.

    Raises:
        UserError: a layout given by name does not support this model.
    """
    fast = None
    if layout != "padded":
        fast = first_that_fits(model, layout, lambda name: FastPolicy(model, name, options))
    return fast or Policy(model, options)


def _as_grid(hidden: Tensor, row: Tensor, column: Tensor, batch: TokenBatch) -> Tensor:
    """[N, R, H] from [M, H]."""
    grid = hidden.new_zeros((*batch.response_ids.shape, hidden.shape[-1]))
    return grid.index_put((row, column), hidden)


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is a linear layer whose weights may be used without calling its forward."""
    is_watched = bool(head._forward_pre_hooks or head._forward_hooks)
    return (
        type(head) in (nn.Linear, OneDnnLinear)
        and not is_watched
        and not hasattr(head.weight, "ds_id")
    )
