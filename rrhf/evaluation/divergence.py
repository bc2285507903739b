"""How far a policy has moved from its reference, in nats per response.

KL(policy || reference) = E over responses sampled from the policy of
sum over tokens (log p - log p_ref). Its plain estimate is that mean, `kl` (k1 of J. Schulman,
"Approximating KL divergence", 2020); `kl_k3`, the sum of r - 1 - log r with r = p_ref / p at every
token, has the same expectation, is never negative and mostly varies less.

Both log-probs are taken at the sampling temperature, on the tokens that were sampled. Along greedy
responses, or with top-k, top-p or a repetition penalty, the number is still a log-ratio but no
longer the expectation: results say so in a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rrhf.evaluation.bootstrap import Measure
from rrhf.generation.engine import SamplingParams
from rrhf.model_paths import model_folder


def sequence_log_ratio(logprobs: Tensor, reference_logprobs: Tensor) -> float:
    """sum of log p - log p_ref over a response's tokens (k1): nats.

    Args:
        logprobs: [T] of the sampled tokens under the policy.
        reference_logprobs: [T] of the same tokens under the reference.
    """
    return float((logprobs.double() - reference_logprobs.double()).sum())


def sequence_k3(logprobs: Tensor, reference_logprobs: Tensor) -> float:
    """sum of r - 1 - log r over a response's tokens, r = p_ref / p: nats, never negative."""
    log_ratio = reference_logprobs.double() - logprobs.double()
    return float((log_ratio.expm1() - log_ratio).sum())


def divergence_measures(
    prompt_ids: Sequence[str],
    logprobs: Sequence[Sequence[Tensor]],
    reference_logprobs: Sequence[Sequence[Tensor]],
) -> dict[str, Measure]:
    """`kl` and `kl_k3`: responses of a prompt averaged first.

    Args:
        prompt_ids: one for each prompt.
        logprobs: for each prompt, for each of its responses, [T].
        reference_logprobs: likewise, of the same tokens.
    """
    k1: dict[str, float] = {}
    k3: dict[str, float] = {}
    for prompt_id, own, theirs in zip(prompt_ids, logprobs, reference_logprobs, strict=True):
        pairs = list(zip(own, theirs, strict=True))
        if pairs:
            k1[prompt_id] = sum(sequence_log_ratio(a, b) for a, b in pairs) / len(pairs)
            k3[prompt_id] = sum(sequence_k3(a, b) for a, b in pairs) / len(pairs)
    return {"kl": Measure(k1), "kl_k3": Measure(k3)}


def best_of_n_bound(n: int) -> float:
    """The most that choosing the best of n can diverge from its policy: log n - (n - 1) / n nats.

    Stiennon et al. 2020, arXiv:2009.01325, appendix G.3; an upper bound in general (Beirami et al.
    2024, arXiv:2401.01879).
    """
    assert n >= 1, "the best of none does not exist"
    return math.log(n) - (n - 1) / n


def expectation_note(params: SamplingParams) -> str | None:
    """Why `kl` is not an expectation for these settings; None where it is."""
    if not params.do_sample:
        return "kl is the log-ratio along greedy responses, not an expectation"
    filters = [
        name
        for name, off in (("top_k", 0), ("top_p", 1.0), ("repetition_penalty", 1.0))
        if getattr(params, name) != off
    ]
    if filters:
        return f"kl ignores {', '.join(filters)}, so it is not the divergence of what was sampled"
    return None


def weight_distance(model: Any, reference: Any) -> float | None:
    """How far training moved the weights: |w - w_ref| / |w_ref|, L2 over all of them.

    For models in float32: rounded to bfloat16, most of what training moves is lost or exaggerated.

    Returns:
        None where the two have different weights (other names or shapes).
    """
    return _distance(dict(model.named_parameters()), dict(reference.named_parameters()))


def stored_weight_distance(folder: str | Path, reference: str | Path) -> float | None:
    """`weight_distance` of two model folders, reading the stored weights one at a time.

    Returns:
        As `weight_distance`; None also where one of the two is no folder with safetensors.
    """
    with ExitStack() as opened:
        return _distance(_StoredWeights(folder, opened), _StoredWeights(reference, opened))


class _StoredWeights(Mapping[str, Tensor]):
    """The tensors of a model folder by name, read when asked for."""

    def __init__(self, folder: str | Path, opened: ExitStack) -> None:
        self._files = {}
        for path in sorted(Path(model_folder(folder)).glob("model*.safetensors")):
            file = opened.enter_context(safe_open(path, framework="pt"))
            self._files.update(dict.fromkeys(file.keys(), file))

    def __getitem__(self, name: str) -> Tensor:
        found: Tensor = self._files[name].get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float | None:
    if ours.keys() != theirs.keys():
        return None
    moved = total = 0.0
    for name in ours:
        weight, start = ours[name].detach(), theirs[name].detach()
        if start.shape != weight.shape:
            return None
        start = start.to(weight.device).float()
        moved += float((weight.float() - start).square().sum(dtype=torch.float64))
        total += float(start.square().sum(dtype=torch.float64))
    return math.sqrt(moved / total) if total else None
