"""The one forward interface of every policy: a batch in, the log-probs of its responses out.

Everything that needs a response's likelihood (rank losses, SFT, PPO, evaluation) calls
`Policy.forward` and nothing inside it: under FSDP2 a call past the root fails, and under DDP it
silently leaves gradients unsynchronised. The layout here is the reference: one padded row for each
response, the head applied at response positions only; `.layouts` has faster ones.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrhf.data.collate import TokenBatch


@dataclass(frozen=True)
class PolicyOutputs:
    """What the forward interface returns.

    Attributes:
        logprobs: [N, R] float32, nats: log P(token | prompt, earlier tokens); 0 at padding.
        mean_logprobs: [N, R] float32: the mean of the log-probs of all V tokens at each position
            (label smoothing needs it); 0 at padding; None unless asked for.
        entropy: [N, R] float32, nats; 0 at padding; None unless asked for.
    """

    logprobs: Tensor
    mean_logprobs: Tensor | None = None
    entropy: Tensor | None = None


@dataclass(frozen=True)
class LogprobOptions:
    """What is asked of a policy's distributions.

    Attributes:
        temperature: the sampling temperature; it divides the logits here too.
        with_entropy: also return the entropy of each position.
        with_mean_logprobs: also return the mean log-prob over the vocabulary.
        entropy_has_gradient: False if the entropy is only a metric.
    """

    temperature: float = 1.0
    with_entropy: bool = False
    with_mean_logprobs: bool = False
    entropy_has_gradient: bool = True

    def __post_init__(self) -> None:
        assert self.temperature > 0, "a temperature of zero has no log-probs"


PLAIN = LogprobOptions()
"""The log-probs alone, at temperature 1."""


class Policy(nn.Module):
    """A causal language model behind the one forward interface.

    Args:
        model: a Hugging Face causal language model.
        options: what is asked of its distributions.
    """

    def __init__(self, model: PreTrainedModel, options: LogprobOptions = PLAIN) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, batch: TokenBatch) -> PolicyOutputs:
        """Log-probs of every response token of the batch."""
        width = batch.response_ids.shape[1]
        return self._of_logits(self._run(batch, width).logits[:, -width:], batch)

    def with_hidden(self, batch: TokenBatch) -> tuple[PolicyOutputs, Tensor]:
        """What `forward` gives, and the hidden states [N, R, H] that predict the response tokens:
        the last layer's, after the final norm. Values at padding have no meaning."""
        width = batch.response_ids.shape[1]
        outputs = self._run(batch, width, output_hidden_states=True)
        logits, hidden = outputs.logits[:, -width:], outputs.hidden_states[-1][:, -width:]
        return self._of_logits(logits, batch), hidden

    def hidden(self, batch: TokenBatch) -> Tensor:
        """The hidden states of `with_hidden`, with as little of the head as the model allows."""
        outputs = self._run(batch, 1, output_hidden_states=True)
        found: Tensor = outputs.hidden_states[-1][:, -batch.response_ids.shape[1] :]
        return found

    def _run(self, batch: TokenBatch, num_logits: int, **more: Any) -> Any:
        """The model's outputs on padded rows, with the logits of their last columns.

        Without each row's last token: nothing is predicted from it.
        """
        inner = inner_model(self.model)
        arguments = padded_arguments(inner, *(whole[:, :-1] for whole in batch.full_rows()))
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            arguments["logits_to_keep"] = num_logits
        return self.model(**arguments, **more)

    def _of_logits(self, logits: Tensor, batch: TokenBatch) -> PolicyOutputs:
        """From the logits [N, R, V] that predict the response tokens."""
        options, is_padding = self.options, ~batch.response_mask
        logits = logits.float() / options.temperature
        chosen = logits.gather(-1, batch.response_ids[..., None]).squeeze(-1)
        normaliser = torch.logsumexp(logits, dim=-1)
        logprobs = (chosen - normaliser).masked_fill(is_padding, 0.0)
        mean_logprobs = entropy = None
        if options.with_mean_logprobs:
            mean_logprobs = (logits.mean(-1) - normaliser).masked_fill(is_padding, 0.0)
        if options.with_entropy:
            logs = logits - normaliser[..., None]
            logs = logs if options.entropy_has_gradient else logs.detach()
            entropy = -(logs.exp() * logs).sum(-1).masked_fill(is_padding, 0.0)
        return PolicyOutputs(logprobs, mean_logprobs, entropy)


def inner_model(model: Any) -> Any:
    """The Hugging Face model itself, with adapters or without."""
    return getattr(model, "get_base_model", lambda: model)()


def padded_arguments(
    module: nn.Module, ids: Tensor, mask: Tensor, position_ids: Tensor
) -> dict[str, Any]:
    """What a model or its trunk is called with for padded rows."""
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    # Some models take no position ids and derive the same positions from the mask.
    if "position_ids" in inspect.signature(module.forward).parameters:
        arguments["position_ids"] = position_ids
    return arguments
