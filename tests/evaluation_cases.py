"""Prompts, models and a slow oracle that several tests of the evaluation share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny import byte_level_tokenizer, tiny_llama

from rrhf.data.chat_format import ChatCodec
from rrhf.data.conversations import render_messages
from rrhf.evaluation.likelihoods import LikelihoodReader
from rrhf.records import Candidate, CandidateSet, Message, set_id


def prompt(content: str, *candidates: Candidate, origin: str = "") -> CandidateSet:
    messages = (Message("user", content),)
    query = render_messages("hh", messages)
    return CandidateSet(set_id(query, messages), query, messages, candidates, origin)


def reply(text: str, source: str = "", reason: Any = "stop") -> Candidate:
    return Candidate(text, source, finish_reason=reason)


def reader(seed: int = 0, window: int = 128, **options: Any) -> LikelihoodReader:
    tokenizer = byte_level_tokenizer()
    model = tiny_llama(len(tokenizer), seed, window)
    return LikelihoodReader(model, ChatCodec(tokenizer), f"tiny-{seed}", **options)


def slow_logprobs(
    model: Any, prompt_ids: Sequence[int], ids: Sequence[int], temperature: float = 1.0
) -> list[float]:
    """One forward a token, alone, in float64, nothing cached, nothing padded."""
    model = model.double()
    found = []
    with torch.no_grad():
        for place, token in enumerate(ids):
            seen = torch.tensor([[*prompt_ids, *ids[:place]]])
            logits = model(input_ids=seen, use_cache=False).logits[0, -1] / temperature
            found.append(float(logits[token] - torch.logsumexp(logits, 0)))
    model.float()
    return found
