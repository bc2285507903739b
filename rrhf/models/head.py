"""The head of a language model applied only where a token is asked for, and what it says of it.

From hidden states and the head's weights come the log-prob of each target, and on request entropy
and mean log-prob, without a table of all logits where that would be large. Three forms:

- *stored*: the logits stay for the backward pass; the fastest where they are small;
- *recomputed*: only their normaliser stays, each chunk is multiplied again in the backward pass;
- *frozen*: a head that is not trained leaves the gradient towards its hidden state, ready to be
  scaled, so that nothing is multiplied again (for log-probs; entropy may be watched beside them).

Rows whose gradient is exactly zero are left out of the backward pass: in RRHF that is every
candidate that is neither the best of its prompt nor in a violated pair.

Legend: M tokens, H hidden, V vocabulary. Left out: heads that are more than one linear layer (the
caller gives their logits to `statistics_of_logits`), gradients of gradients, and a second backward
pass over one forward (it is refused: the logits of the first have been overwritten).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

STORED_BYTES = 256 << 20
"""Logits up to this size are kept for the backward pass rather than computed twice."""

CHUNK_BYTES = 64 << 20
"""Size in float32 of the logits that exist at once, where they are not kept."""


@dataclass(frozen=True)
class LogitShape:
    """What a model does to its logits after the linear layer.

    `logits = softcap * tanh(scale * z / softcap) / temperature`.

    Attributes:
        scale: factor.
        softcap: bound of the logits, or None.
        temperature: of sampling.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply_(self, z: Tensor) -> Tensor:
        """Logits from what the linear layer gave, float32, in place."""
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)
        elif self.scale != self.temperature:
            z.mul_(self.scale / self.temperature)
        return z

    def pull_back_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of z from that of the logits, in place."""
        if self.softcap is not None:
            saturation = (logits * (self.temperature / self.softcap)).square_()
            gradient.mul_(saturation.neg_().add_(1.0))
        if self.scale != self.temperature:
            gradient.mul_(self.scale / self.temperature)
        return gradient


def logit_shape(config: Any, temperature: float = 1.0) -> LogitShape:
    """How a model with this config shapes its logits (Gemma 2, Cohere, Granite, Falcon-H1)."""
    text = config.get_text_config()
    scale = 1.0
    if isinstance(factor := getattr(text, "logit_scale", None), float):
        scale *= factor
    if isinstance(divisor := getattr(text, "logits_scaling", None), int | float) and divisor:
        scale /= divisor
    if isinstance(factor := getattr(text, "lm_head_multiplier", None), int | float):
        scale *= factor
    softcap = getattr(text, "final_logit_softcapping", None)
    return LogitShape(scale, float(softcap) if softcap else None, temperature)


@dataclass(frozen=True)
class TokenStatistics:
    """What the head says of M target tokens; [M] float32, nats; None unless asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    mean_logprobs: Tensor | None


def token_statistics(
    hidden: Tensor,
    head: nn.Linear,
    targets: Tensor,
    shape: LogitShape,
    with_entropy: bool = False,
    with_mean_logprobs: bool = False,
    stored_bytes: int = STORED_BYTES,
    chunk_bytes: int = CHUNK_BYTES,
    entropy_has_gradient: bool = True,
) -> TokenStatistics:
    """Log-prob of each target under the logits of its hidden state.

    Args:
        hidden: [M, H] after the final norm.
        head: the output layer, H to V.
        targets: [M] int64.
        shape: what follows the linear layer.
        with_entropy: also the entropy of each distribution.
        with_mean_logprobs: also the mean log-prob of the V tokens.
        stored_bytes: logits up to this size are kept for the backward pass; 0 = never.
        chunk_bytes: bounds the logits that exist at once where they are not kept.
        entropy_has_gradient: False where the entropy is only looked at; it costs little then.
    """
    plan = _Plan(
        shape, with_entropy, with_mean_logprobs, stored_bytes, chunk_bytes, entropy_has_gradient
    )
    logprobs, entropy, mean = _Statistics.apply(hidden, head.weight, head.bias, targets, plan)
    return TokenStatistics(
        logprobs, entropy if with_entropy else None, mean if with_mean_logprobs else None
    )


def statistics_of_logits(
    raw: Tensor,
    targets: Tensor,
    shape: LogitShape,
    with_entropy: bool = False,
    with_mean_logprobs: bool = False,
    entropy_has_gradient: bool = True,
) -> TokenStatistics:
    """As `token_statistics`, from what a head of any kind gave: [M, V], in one piece."""
    logits = raw.float() * shape.scale
    if shape.softcap is not None:
        logits = torch.tanh(logits / shape.softcap) * shape.softcap
    logs = (logits / shape.temperature).log_softmax(-1)
    watched = logs if entropy_has_gradient else logs.detach()
    return TokenStatistics(
        logs.gather(-1, targets[:, None]).squeeze(-1),
        -(watched.exp() * watched).sum(-1) if with_entropy else None,
        logs.mean(-1) if with_mean_logprobs else None,
    )


@dataclass(frozen=True)
class _Plan:
    shape: LogitShape
    with_entropy: bool
    with_mean: bool
    stored_bytes: int
    chunk_bytes: int
    entropy_has_gradient: bool

    @property
    def pulls_entropy(self) -> bool:
        return self.with_entropy and self.entropy_has_gradient

    def rows(self, vocabulary: int) -> int:
        return max(32, self.chunk_bytes // (4 * vocabulary))


class _Statistics(torch.autograd.Function):
    """([M] log-prob, [M] entropy, [M] mean log-prob); what was not asked for is empty."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        compute = _compute_dtype(hidden, weight)
        count, vocabulary = len(hidden), len(weight)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_grad = needs_hidden or needs_weight or needs_bias
        only_logprobs = not (plan.pulls_entropy or plan.with_mean)
        frozen = needs_hidden and not needs_weight and not needs_bias and only_logprobs
        size = count * vocabulary * compute.itemsize
        stored = needs_grad and not frozen and size <= plan.stored_bytes

        normaliser = hidden.new_empty(count, dtype=torch.float32)
        logprobs = torch.empty_like(normaliser)
        entropy = torch.empty_like(normaliser) if plan.with_entropy else normaliser.new_empty(0)
        mean = torch.empty_like(normaliser) if plan.with_mean else normaliser.new_empty(0)
        kept = None
        if frozen or stored:
            kept = hidden.new_empty(
                (count, vocabulary if stored else len(weight[0])), dtype=compute
            )
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(compute)
            for start in range(0, count, plan.rows(vocabulary)):
                rows = slice(start, start + plan.rows(vocabulary))
                place = kept[rows] if stored and kept is not None else None
                raw = _linear(hidden[rows].to(compute), matrix, bias, place)  # [m, V]
                # Kept: products of half precision as they are, those in float32 as logits.
                logits = plan.shape.apply_(raw.float())
                picked = targets[rows, None]
                shares = None
                if frozen or plan.with_entropy:
                    shares, normaliser[rows] = _shares(logits)
                else:
                    normaliser[rows] = torch.logsumexp(logits, -1)
                logprobs[rows] = logits.gather(-1, picked).squeeze(-1) - normaliser[rows]
                if plan.with_mean:
                    mean[rows] = logits.mean(-1) - normaliser[rows]
                if plan.with_entropy and shares is not None:
                    expected = torch.bmm(shares[:, None], logits[:, :, None]).flatten()
                    entropy[rows] = normaliser[rows] - expected
                if frozen and shares is not None and kept is not None:
                    slope = shares.neg_()
                    slope.scatter_add_(-1, picked, torch.ones_like(picked, dtype=slope.dtype))
                    slope = plan.shape.pull_back_(slope, logits).to(compute)
                    torch.mm(slope, matrix, out=kept[rows])
        ctx.plan, ctx.compute, ctx.frozen = plan, compute, frozen
        if plan.with_entropy and not plan.entropy_has_gradient:
            ctx.mark_non_differentiable(entropy)
        if needs_grad:
            ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy, kept)
        return logprobs, entropy, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        for_logprobs, for_entropy, for_mean = gradients
        hidden, weight, bias, targets, normaliser, entropy, kept = ctx.saved_tensors
        plan: _Plan = ctx.plan
        if ctx.frozen:
            return (kept * for_logprobs[:, None]).to(hidden.dtype), None, None, None, None
        is_active = for_logprobs != 0
        if plan.pulls_entropy:
            is_active = is_active | (for_entropy != 0)
        if plan.with_mean:
            is_active = is_active | (for_mean != 0)
        chunk = plan.rows(len(weight))
        in_float32 = ctx.compute == torch.float32
        # Logits that were kept in float32 become the slope in place, so all of them may go at once.
        step = len(hidden) if kept is not None and in_float32 else chunk
        pieces: list[Any] = [slice(start, start + step) for start in range(0, len(hidden), step)]
        if not is_active.all():
            pieces = list(is_active.nonzero().squeeze(-1).split(chunk))

        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        to_hidden = torch.zeros_like(hidden) if needs_hidden else None
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            matrix = weight.to(ctx.compute)
            for rows in pieces:
                states = hidden[rows].to(ctx.compute)
                if kept is not None and in_float32:
                    logits = kept[rows]
                else:
                    raw = _linear(states, matrix, bias) if kept is None else kept[rows]
                    logits = plan.shape.apply_(raw.float())
                slope = _slope(
                    plan,
                    logits,
                    normaliser[rows],
                    targets[rows],
                    for_logprobs[rows],
                    (for_entropy[rows], entropy[rows]) if plan.pulls_entropy else None,
                    for_mean[rows] if plan.with_mean else None,
                )
                if to_bias is not None:
                    to_bias += slope.sum(0)
                slope = slope.to(ctx.compute)
                if to_hidden is not None:
                    to_hidden[rows] = (slope @ matrix).to(hidden.dtype)
                if to_weight is not None:
                    # Sums over chunks stay in float32, whatever the products are in.
                    if in_float32:
                        to_weight.addmm_(slope.T, states)
                    else:
                        to_weight += slope.T @ states
        return (
            to_hidden,
            None if to_weight is None else to_weight.to(weight.dtype),
            None if to_bias is None else to_bias.to(bias.dtype),
            None,
            None,
        )


def _shares(logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax [m, V], and the logarithm [m] of what it divides by: the largest share tells it."""
    shares = logits.softmax(-1)
    return shares, logits.amax(-1) - shares.amax(-1).log()


def _slope(
    plan: _Plan,
    logits: Tensor,
    normaliser: Tensor,
    targets: Tensor,
    for_logprobs: Tensor,
    for_entropy: tuple[Tensor, Tensor] | None,
    for_mean: Tensor | None,
) -> Tensor:
    """[m, V] the gradient towards the linear layer's output; overwrites `logits` where it can.

    With q = softmax(logits): d logprob_y = [y] - q, d mean = 1/V - q, d entropy = -q (log q + S).
    """
    weight_of_q = -for_logprobs if for_mean is None else -for_logprobs - for_mean
    is_capped = plan.shape.softcap is not None  # then the logits are needed once more
    logs = logits - normaliser[:, None] if is_capped else logits.sub_(normaliser[:, None])
    if for_entropy is None:
        slope = logs.exp_().mul_(weight_of_q[:, None])
    else:
        gradient, entropy = for_entropy
        shares = logs.exp()
        slope = logs.add_(entropy[:, None]).mul_(-gradient[:, None])
        slope = slope.add_(weight_of_q[:, None]).mul_(shares)
    slope.scatter_add_(-1, targets[:, None], for_logprobs[:, None])
    if for_mean is not None:
        slope.add_((for_mean / slope.shape[-1])[:, None])
    return plan.shape.pull_back_(slope, logits)


def _linear(
    states: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """[m, V], into `out` where one is given."""
    if out is None:
        out = states.new_empty((len(states), len(matrix)))
    torch.mm(states, matrix.T, out=out)
    return out if bias is None else out.add_(bias.to(out.dtype))


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype
