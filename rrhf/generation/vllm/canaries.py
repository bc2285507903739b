"""Eight fixed texts, the canaries, by which a server's weights are compared with a policy's.

Both sides compute the log-prob of every token. The server is asked in three ways, because each
fault shows in one of them:

    prompt      log-probs of the whole text          stale or partly stale weights (a shared output
                                                     layer, a skipped sync, adapters not merged)
    sampled     of a few sampled tokens; the server  its cache of prompts still holds what the old
                may use its cache of prompts         weights computed
    filtered    of tokens sampled with top_k = 2     it reports log-probs after filters

A difference is the mean over a text's tokens of the absolute difference, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.generation.vllm.http import ServerFault
from rrhf.generation.vllm.server import Served, VLLMServer

FLOAT32_BOUND, COARSE_BOUND = 1e-3, 0.15
"""Largest difference that is accepted: with float32 weights on both sides, and otherwise. With a
server in bfloat16 (SmolLM2-135M, CPU), differences from the float32 policy were 0.03 to 0.08; in
float32 they were below 2e-5."""

_NEW_TOKENS = 8
_LENGTHS = (24, 40, 72, 100, 136, 160, 200, 264)
"""Numbers of tokens. Servers keep whole blocks of a prompt: 16 tokens on GPUs, 128 on CPUs."""
_TEXT = (
    "Could you explain in a few words how plants make food from light? They take in water and air, "
    "and with the energy of the sun they build sugar. What should I cook tonight for four people "
    "who like rice? Perhaps a curry with beans: fry an onion, add 2 spoons of curry powder, then "
    "400 g of beans, and let it simmer for 15 minutes. I am sorry, but I cannot help with that. "
)
_SLOPE_BOUND, _SLOPE_ERRORS = 0.5, 6.0
"""The server's log-probs must move as the policy's did since the last sync: the slope of a line
through the moves of all tokens may differ from 1 by this, or by so many of its standard errors. The
rounding of a server in bfloat16 cancels in its moves, so that this finds a sync that was skipped
where the differences themselves are within the bound."""
_VISIBLE = 0.05
"""Moves smaller than this share of the differences are not judged: rounding may hide them."""

Score = Callable[[Sequence[Sequence[int]]], list[Tensor]]
"""Computes the log-probs [T - 1] of each sequence's tokens but the first."""


class WrongWeights(ServerFault):
    """The server's log-probs are not those of the policy."""


@dataclass(frozen=True)
class Differences:
    """The largest differences over the canaries, nats per token.

    Attributes:
        prompt, sampled, filtered: as in the module's docstring.
    """

    prompt: float
    sampled: float
    filtered: float


def canary_prompts(codec: ChatCodec, window: int) -> list[list[int]]:
    """Return the canaries as ids, each with another beginning; long ones are cut to the window."""
    words = codec.tokenizer(_TEXT, add_special_tokens=False).input_ids
    starts = range(0, len(words), max(1, len(words) // len(_LENGTHS)))
    found = []
    for start, length in zip(starts, _LENGTHS, strict=False):
        kept = max(2, min(length, window - _NEW_TOKENS))
        ids = [*words[start:], *words[:start]] * (kept // len(words) + 1)
        found.append(ids[:kept])
    return found


class Canaries:
    """Compares a server with a policy in this process.

    Args:
        server: the server.
        prompts: from `canary_prompts`.
        score: computes log-probs under the policy.
        bound: largest difference that is accepted.
    """

    def __init__(
        self, server: VLLMServer, prompts: Sequence[list[int]], score: Score, bound: float
    ) -> None:
        self.bound = bound
        self._server, self._prompts, self._score = server, prompts, score
        # Log-probs of the prompts' tokens when weights were last given: the server's, the policy's.
        self._last: tuple[Tensor, Tensor] | None = None

    def warm(self, served: Served) -> None:
        """Let the server cache the canaries, so that a cache that is not reset shows later."""
        self._server.complete(served, self._prompts, _sampling(0))

    def check(self, served: Served, are_new: bool = True) -> Differences:
        """Compare server and policy.

        Args:
            served: the server's description.
            are_new: whether the server was just given weights; otherwise only the log-probs of
                whole texts are compared.

        Raises:
            WrongWeights: they differ by more than the bound, or the server still has the weights
                that it had before it was given these.
            ServerFault: the server failed.
            UserError: the policy's own log-probs are not finite.
        """
        read = self._server.prompt_logprobs(served, self._prompts)
        texts, filters = [list(ids) for ids in self._prompts], [0, 2]
        written: list[tuple[int, list[float]]] = []  # filter and log-probs of each continuation
        for kind, top_k in enumerate(filters if are_new else []):
            part = list(range(kind, len(texts), 2))
            asked = [self._prompts[i] for i in part]
            for i, (choice,) in zip(
                part, self._server.complete(served, asked, _sampling(top_k)), strict=True
            ):
                texts[i] += choice.token_ids
                written.append((i, choice.logprobs))
        ours = self._score(texts)
        if not all(one.isfinite().all() for one in ours):
            raise UserError(
                "the policy's log-probs of the canary texts are not finite numbers, so its weights "
                "are damaged: it diverged in training, or its files are broken; use an earlier one"
            )
        heads = [one[: len(ids) - 1] for one, ids in zip(ours, self._prompts, strict=True)]
        theirs = [torch.tensor(one) for one in read]
        gaps: dict[str, list[float]] = {
            "prompt": _gaps(theirs, heads),
            "sampled": [],
            "filtered": [],
        }
        for i, logprobs in written:
            tail = ours[i][len(self._prompts[i]) - 1 :]
            kind_name = "filtered" if i % 2 else "sampled"
            gaps[kind_name] += _gaps([torch.tensor(logprobs)], [tail])
        found = Differences(**{name: max(values, default=0.0) for name, values in gaps.items()})
        self._require_small(found)
        if are_new:
            now = torch.cat(theirs).double(), torch.cat(heads).double()
            self._require_new(*now)
            self._last = now
        return found

    def _require_small(self, found: Differences) -> None:
        causes = {
            "prompt": "its weights are not the policy's: it was not given them, or kept an output "
            "layer that is shared with the embeddings (`rrhf engine vllm start` serves a copy that "
            "shares none), or another program gave it others",
            "sampled": "its cache of prompts still holds what other weights computed",
            "filtered": "it reports log-probs after filters; start it with --logprobs-mode "
            "raw_logprobs",
        }
        for name, cause in causes.items():
            value = getattr(found, name)
            if not value <= self.bound:
                raise WrongWeights(
                    f"disagrees with the policy by {value:.3g} nats a token on eight canary texts "
                    f"({name}), more than {self.bound:g}: {cause}"
                )

    def _require_new(self, theirs: Tensor, ours: Tensor) -> None:
        """Refuse a server that kept the weights of the last sync, even if those are within the
        bound; both log-probs [tokens]."""
        if self._last is None:
            return
        their_move, our_move = theirs - self._last[0], ours - self._last[1]
        size = our_move.square().sum()
        if not size > _VISIBLE**2 * (theirs - ours).square().sum():
            return
        slope = (their_move * our_move).sum() / size
        error = ((their_move - slope * our_move).square().mean() / size).sqrt()
        if abs(1 - slope) > max(_SLOPE_BOUND, _SLOPE_ERRORS * float(error)):
            raise WrongWeights(
                "still has the weights of the last sync, or part of them: since then its log-probs "
                f"moved {float(slope):.3g} times as far as the policy's"
            )


def _sampling(top_k: int) -> dict[str, object]:
    return {
        "n": 1,
        "max_tokens": _NEW_TOKENS,
        "temperature": 1.0,
        "top_k": top_k,
        "top_p": 1.0,
        "seed": 0,
        "ignore_eos": True,
    }


def _gaps(ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[float]:
    return [float((a - b).abs().mean()) for a, b in zip(ones, others, strict=True)]
