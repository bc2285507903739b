"""What engines that sample ids share: a prompt must fit; ids become text, cut at a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from rrhf.data.chat_format import ChatCodec
from rrhf.errors import UserError
from rrhf.generation.engine import Sample
from rrhf.records import CandidateSet, FinishReason


def sample_of(
    codec: ChatCodec,
    prompt: CandidateSet,
    prompt_ids: Sequence[int],
    stops: Sequence[str],
    written: tuple[Tensor, Tensor | None, FinishReason],
) -> Sample:
    """Return the sample that a response's ids make.

    The text of a response with a stop string ends exactly before it, and the ids are those that lie
    wholly before it.

    Args:
        codec: decodes the ids.
        prompt: the prompt.
        prompt_ids: its ids.
        stops: strings that end a response and are not part of it.
        written: the sampled ids, their log-probs (None if not known) and the finish reason.
    """
    token_ids, logprobs, finish_reason = written
    ids = token_ids.tolist()
    text = codec.decode_response(prompt, ids)
    raw = codec.decode_tail(ids)
    starts = [place for stop in stops if (place := raw.find(stop)) >= 0]
    if not starts:
        return Sample(prompt_ids, token_ids, logprobs, finish_reason, text)
    start = min(starts)
    # 1 if `raw` still has the blank that the chat format puts before a response.
    lead = 0 if text[:start] == raw[:start] else 1
    text = text[: max(0, start - lead)]
    kept = _tokens_before(start, ids, codec.decode_tail)
    return Sample(
        prompt_ids,
        token_ids[:kept],
        None if logprobs is None else logprobs[:kept],
        "stop",
        text if text.strip() else "",
    )


def _tokens_before(
    position: int, ids: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> int:
    """Count the tokens that lie wholly before a position of the decoded text."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high + 1) // 2
        if len(decode(ids[:middle])) <= position:
            low = middle
        else:
            high = middle - 1
    return low


def require_fit(prompt: CandidateSet, ids: list[int] | None, room: int | None) -> list[int]:
    """Return a prompt's ids; refuse a prompt that is empty or does not fit (`ids` is None).

    Args:
        prompt: the prompt, for the message.
        ids: its tokens.
        room: maximum number of tokens in a prompt.

    Raises:
        UserError: the prompt has no ids.
    """
    if ids is None:
        raise UserError(
            f"prompt {prompt.id}: is empty, or its last turn does not fit into {room} tokens; "
            "shorten it, or raise max_prompt_tokens"
        )
    return ids
