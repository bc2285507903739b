"""Log-probs as the program released with the RRHF paper gets them, written from a description.

Every response is a row with the whole prompt, padded on the right; the model gives the logits of
every position, these become a table of log-probs of every token, a copy of it is made, and the
response tokens are picked out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from rrhf.data.collate import TokenBatch
from rrhf.models.forward.logprobs import PolicyOutputs


class OriginalStyle(nn.Module):
    """Takes the place of a policy: a batch in, log-probs of the response tokens out."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TokenBatch) -> PolicyOutputs:
        ids, is_attended, picked = right_padded(batch)
        logits = self.model(input_ids=ids, attention_mask=is_attended).logits  # [N, L, V]
        table = log_softmax(logits, dim=-1).clone()[:, :-1]
        chosen = table.gather(-1, ids[:, 1:, None]).squeeze(-1)  # [N, L - 1]
        columns = picked.clamp_min(0)
        return PolicyOutputs(chosen.gather(1, columns).masked_fill(picked < 0, 0.0))


def right_padded(batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [N, L], attention mask [N, L], and where each response token is predicted [N, R]."""
    prompts = batch.prompt_lengths[batch.prompt_index].tolist()
    lengths = batch.response_lengths.tolist()
    width = max(p + r for p, r in zip(prompts, lengths, strict=True))
    ids = batch.response_ids.new_zeros(batch.num_rows, width)
    mask = torch.zeros_like(ids)
    picked = torch.full_like(batch.response_ids, -1)
    for row, (p, r) in enumerate(zip(prompts, lengths, strict=True)):
        ids[row, :p] = batch.prompt_ids[batch.prompt_index[row], -p:]
        ids[row, p : p + r] = batch.response_ids[row, :r]
        mask[row, : p + r] = 1
        picked[row, :r] = torch.arange(p - 1, p + r - 1, device=ids.device)
    return ids, mask, picked
