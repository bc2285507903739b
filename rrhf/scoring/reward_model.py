"""Scores from a reward model that runs here: text in, numbers out.

A scorer renders each prompt by the reward model's own template and tokenizer, never the policy's,
so the two may differ in everything. What rows have in common at their beginning passes the network
once (`row_groups`), and batches are made by tokens; a score does not depend on its batch mates
beyond rounding. A prompt that is too long loses whole turns from its
left; a response is never cut, and one that alone fills the window is not scored (None), counted.
The normaliser that was learnt in training is applied here and nowhere else.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rrhf.algorithms.normalizers import normalize
from rrhf.data.chat_format import ChatCodec, render_messages
from rrhf.data.collate import TokenBatch
from rrhf.errors import UserError
from rrhf.model_paths import model_folder
from rrhf.models.forward.onednn_linear import fast_linears
from rrhf.models.loading import LoadOptions, context_window, load_tokenizer, resolve_device
from rrhf.models.reward_folders import config_folder
from rrhf.models.reward_layouts import FastRewardModel, build_reward_model
from rrhf.models.reward_model import (
    CHAT_FORMAT_KEY,
    RewardModel,
    load_reward_model,
    score_normalizer,
)
from rrhf.models.trlx_reward_model import load_trlx_reward_model
from rrhf.progress import pulse
from rrhf.records import Candidate, CandidateSet, Message
from rrhf.scoring.row_groups import batches_of, group_batch, group_rows
from rrhf.scoring.scorer import Scorer

logger = logging.getLogger(__name__)

SCORE_POSITIONS = ("last_token", "first_eos")
DEFAULT_WINDOW = 2048
PUBLISHED_TRLX_LENGTH = 1024
_QUESTION = (Message("user", "a question"),)


class RowScorer:
    """The part that every local reward model shares: rows of ids in, raw scores out.

    Args:
        model: behind the one forward interface, on its device. One of `build_reward_model`'s
            faster engines gets rows in groups.
        pad_id: filler.
        max_batch_tokens: tokens of one forward, padding included.
    """

    def __init__(self, model: RewardModel, pad_id: int, max_batch_tokens: int = 16384) -> None:
        if max_batch_tokens < 1:
            raise UserError(f"--max_batch_tokens {max_batch_tokens}: must be 1 or more")
        self._model = model.eval()
        self._pad_id = pad_id
        self._max_batch_tokens = max_batch_tokens
        self._device = next(model.parameters()).device
        self._layout = model.layout if isinstance(model, FastRewardModel) else None
        self._window = model.window if isinstance(model, FastRewardModel) else None

    @torch.inference_mode()
    def score_rows(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Raw scores in the order of the rows; each row has at least one id."""
        scores, num_done = [math.nan] * len(rows), 0
        with fast_linears(self._model):
            for places, batch in self._batches(rows):
                for place, score in zip(places, self._model(batch).tolist(), strict=True):
                    scores[place] = score
                num_done += len(places)
                pulse(f"{num_done} of {len(rows)} responses scored")
        return scores

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], TokenBatch]]:
        """Batches with the places of their rows.

        Of each kind the longest come first, so that what does not fit in memory fails at once.
        """
        plain, grouped = list(range(len(rows))), []
        if self._layout is not None:
            # A model whose layers do not tell their window gets longer rows padded.
            window = math.inf if self._window is None else self._window
            plain = [place for place in plain if len(rows[place]) > window]
            grouped = [place for place, row in enumerate(rows) if len(row) <= window]
        for batch in self._padded(plain, rows):
            yield batch, row_batch([rows[i] for i in batch], self._pad_id, self._device)
        chosen = [rows[place] for place in grouped]
        cut = (self._max_batch_tokens, self._layout == "dense_mask", self._device)
        for groups in batches_of(group_rows(chosen), chosen, *cut):
            places = [grouped[place] for group in groups for place in group.places]
            yield places, group_batch(groups, chosen, self._pad_id, self._device)

    def _padded(self, places: Sequence[int], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        order = sorted(places, key=lambda place: (-len(rows[place]), place))
        batch: list[int] = []
        for place in order:
            width = len(rows[batch[0]]) if batch else 0
            if batch and width * (len(batch) + 1) > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(place)
        if batch:
            yield batch


def row_batch(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> TokenBatch:
    """Whole rows as a batch: each begins at column 0, so that all padding is on the right.

    Made here and not by `collate`, because a row's only token may be its end.
    """
    assert all(rows), "a row has at least one id"
    lengths = torch.tensor([len(row) - 1 for row in rows])
    padded = torch.full((len(rows), int(lengths.max()) + 1), pad_id, dtype=torch.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = torch.tensor(row, dtype=torch.int64)
    return TokenBatch(
        prompt_ids=padded[:, :1],
        prompt_lengths=torch.ones(len(rows), dtype=torch.int64),
        response_ids=padded[:, 1:],
        response_lengths=lengths,
        prompt_index=torch.arange(len(rows)),
        prompt_weights=torch.ones(len(rows)),
    ).to(device)


class RewardModelScorer(Scorer):
    """Any sequence-classification reward model with one label.

    Args:
        path: its folder or hub name.
        score_at: "last_token", or "first_eos" for models that were trained that way.
        use_normalizer: apply the normaliser in the model's config, where it has one.
        chat_format: "auto" = what the model was trained with, else as in `ChatCodec`.
        max_length: tokens of prompt and response; 0 = the model's window.
        max_batch_tokens: tokens of one forward, padding included.
        bf16: weights in bfloat16; the head stays in float32.
        attn_implementation: as transformers spells it.
        trust_remote_code: run code that the folder brings.
        device: where; by default the first GPU or the CPU.
        engine: as in `rrhf.models.reward_layouts.build_reward_model`.

    Attributes:
        name, normalized, window, model: as `rrhf.scoring.scorer.Scorer`.
        unscored: why candidates got None, counted.

    Raises:
        UserError: no reward model there, or an impossible setting.
    """

    window: int

    def __init__(
        self,
        path: str | Path,
        score_at: str = "last_token",
        use_normalizer: bool = True,
        chat_format: str = "auto",
        max_length: int = 0,
        max_batch_tokens: int = 16384,
        bf16: bool = False,
        attn_implementation: str = "sdpa",
        trust_remote_code: bool = False,
        device: torch.device | str | None = None,
        engine: str = "auto",
    ) -> None:
        if score_at not in SCORE_POSITIONS:
            raise UserError(f"--score_at {score_at!r}: choose one of {', '.join(SCORE_POSITIONS)}")
        dtype = "bfloat16" if bf16 else "float32"
        model = load_reward_model(path, LoadOptions(dtype, attn_implementation, trust_remote_code))
        tokenizer = load_tokenizer(path, trust_remote_code)
        if chat_format == "auto":
            chat_format = getattr(model.config, CHAT_FORMAT_KEY, "auto")
        self.codec = ChatCodec(tokenizer, chat_format)
        window = context_window(model)
        if window is not None and max_length > window:
            raise UserError(
                f"--max_length {max_length}: {path} knows {window} positions; give at most {window}"
            )
        self.window = max_length or window or DEFAULT_WINDOW
        self._normalizer = score_normalizer(model.config) if use_normalizer else None
        self.name = f"reward_model:{model_folder(path)}"
        self.normalized = self._normalizer is not None
        self.unscored: Counter[str] = Counter()
        first_end_id = self._first_end_id(path) if score_at == "first_eos" else None
        root = _frozen(model, engine, first_end_id, device)
        self.model = root
        self._rows = RowScorer(root, self.codec.pad_id, max_batch_tokens)

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Scores in order; None where a response alone does not fit, or a score is not finite."""
        scores: list[list[float | None]] = [[None] * len(s.candidates) for s in sets]
        rows: list[list[int]] = []
        places: list[tuple[int, int]] = []
        for i, s in enumerate(sets):
            prompts: dict[int, list[int] | None] = {}
            for j, candidate in enumerate(s.candidates):
                row = self._encode(s, candidate, prompts)
                if isinstance(row, str):
                    _count_unscored(self.unscored, row, s, f" in {self.window} tokens")
                else:
                    rows.append(row)
                    places.append((i, j))
        for (i, j), value in zip(places, self._rows.score_rows(rows), strict=True):
            if math.isfinite(value):
                scores[i][j] = self._normalize(value)
            else:
                self._count("score_not_finite", sets[i])
        return scores

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        """Whether the response fits into the window behind at least the prompt's last turn."""
        return not isinstance(self._encode(s, candidate, {}), str)

    def describe(self) -> dict[str, Any]:
        """What a manifest records."""
        normalizer = self._normalizer
        return super().describe() | {
            "codec": self.codec.describe(),
            "max_length": self.window,
            "normalizer": None if normalizer is None else normalizer.state_dict(),
        }

    def _first_end_id(self, path: str | Path) -> int:
        """The end at which a row is read; refused where every prompt already holds one."""
        asked = CandidateSet("", render_messages("hh", _QUESTION), _QUESTION)
        if self.codec.end_id in (self.codec.encode_prompt(asked) or ()):
            raise UserError(
                f"--score_at first_eos: the chat template of {path} ends the user's turn by the "
                "same token, so all responses would be read in the prompt and get one score; use "
                "last_token"
            )
        return self.codec.end_id

    def _encode(
        self, s: CandidateSet, candidate: Candidate, prompts: dict[int, list[int] | None]
    ) -> list[int] | str:
        """The row of a candidate, or why it has none; `prompts` keeps them by their room."""
        response = self.codec.encode_response(s, candidate.response, candidate.finish_reason)
        if not response:
            # Cut before its first token: nothing was said, which is scored as an empty response.
            response = self.codec.encode_response(s, "", "stop")
        room = self.window - len(response)
        if 0 not in prompts:
            prompts[0] = self.codec.encode_prompt(s)
        whole = prompts[0]
        if whole is not None and len(whole) <= room:
            return [*whole, *response]
        if room < 1:
            return "response_does_not_fit"
        if room not in prompts:
            prompts[room] = self.codec.encode_prompt(s, room)
        cut = prompts[room]
        if cut is None:
            return "last_turn_does_not_fit"
        return [*cut, *response]

    def _normalize(self, value: float) -> float:
        if self._normalizer is None:
            return value
        scaled = normalize(
            torch.tensor(value, dtype=torch.float64), self._normalizer.mean, self._normalizer.std
        )
        return float(scaled)

    def _count(self, reason: str, s: CandidateSet) -> None:
        _count_unscored(self.unscored, reason, s)


class TrlxScorer(Scorer):
    """A reward model in trlX's published layout, scored as it was when RRHF was published.

    The text is query + " " + response + EOS (no second blank where the response begins with one),
    its first tokens are cut past 1024, and the score is read at the first EOS. EOS is always there,
    because such models know nothing else. Conversations are rendered as HH has them.

    Args:
        path: the published folder, or one weight file.
        base: folder with config and tokenizer, where `path` has none.
        double_blank: put the blank even before a response that begins with one, as the released
            script does: for reproducing its numbers.
        max_length: tokens; 0 = 1024, or the model's window if that is less.
        max_batch_tokens, bf16, device, engine: as in `RewardModelScorer`.
    """

    def __init__(
        self,
        path: str | Path,
        base: str | Path | None = None,
        double_blank: bool = False,
        max_length: int = 0,
        max_batch_tokens: int = 16384,
        bf16: bool = False,
        device: torch.device | str | None = None,
        engine: str = "auto",
    ) -> None:
        folder = config_folder(path, base)
        self._tokenizer = load_tokenizer(folder)
        if self._tokenizer.eos_token_id is None:
            raise UserError(f"{folder}: the tokenizer has no EOS token, at which scores are read")
        model = load_trlx_reward_model(path, base, "bfloat16" if bf16 else "float32")
        window = context_window(model) or PUBLISHED_TRLX_LENGTH
        if max_length > window:
            raise UserError(
                f"--max_length {max_length}: {path} knows {window} positions; give at most {window}"
            )
        self._max_length = max_length or min(PUBLISHED_TRLX_LENGTH, window)
        self._double_blank = double_blank
        self._end_id = int(self._tokenizer.eos_token_id)
        self.name = f"reward_model:{model_folder(path)} (trlx)"
        self.unscored: Counter[str] = Counter()
        root = _frozen(model, engine, self._end_id, device)
        self.model = root
        self._rows = RowScorer(root, self._end_id, max_batch_tokens)

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        """Scores in order; None where one is not finite."""
        rows = [self._encode(s, candidate) for s in sets for candidate in s.candidates]
        values = iter(self._rows.score_rows(rows))
        scores: list[list[float | None]] = []
        for s in sets:
            mine: list[float | None] = []
            for _ in s.candidates:
                value = next(values)
                mine.append(value if math.isfinite(value) else None)
                if mine[-1] is None:
                    _count_unscored(self.unscored, "score_not_finite", s)
            scores.append(mine)
        return scores

    def describe(self) -> dict[str, Any]:
        """What a manifest records."""
        own = {"max_length": self._max_length, "double_blank": self._double_blank}
        return super().describe() | own

    def text_of(self, s: CandidateSet, candidate: Candidate) -> str:
        """The text that is scored, without its EOS."""
        is_text = s.messages is None or s.is_plain
        query = s.query if is_text else render_messages("hh", s.messages or ())
        blank = "" if candidate.response.startswith(" ") and not self._double_blank else " "
        return query + blank + candidate.response

    def _encode(self, s: CandidateSet, candidate: Candidate) -> list[int]:
        encoded = self._tokenizer(
            self.text_of(s, candidate), add_special_tokens=False, split_special_tokens=True
        )
        ids = [*encoded.input_ids, self._end_id]
        return ids[-self._max_length :]


def _frozen(
    model: Any, engine: str, first_end_id: int | None, device: torch.device | str | None
) -> RewardModel:
    """The model with the forward interface, moved to its device and frozen."""
    model = model.to(device or resolve_device()).requires_grad_(False)
    return build_reward_model(model, engine, first_end_id=first_end_id)


def _count_unscored(
    unscored: Counter[str], reason: str, s: CandidateSet, details: str = ""
) -> None:
    if not unscored[reason]:
        words = reason.replace("_", " ") + details
        logger.warning("not scored: %s (first: prompt %s)", words, s.id)
    unscored[reason] += 1
