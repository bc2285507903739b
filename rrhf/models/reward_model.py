"""The reward model: a language model's trunk with a linear head, behind one forward interface.

A batch goes in, one raw score for each response comes out. The score is read at the last token that
belongs to the row, found from lengths and never from pad ids: where pad and EOS are one id, the
heads of transformers itself read one token early. On disk it is a standard folder of
`AutoModelForSequenceClassification` with one label, which any other program loads.

A score normaliser lives in the config as plain numbers and is never applied here: losses want raw
scores, and a scorer gives normalised ones. Left out on purpose: more than one label,
encoders.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from rrhf.algorithms.normalizers import Normalizer, normalizer_from_state
from rrhf.data.collate import TokenBatch
from rrhf.errors import UserError
from rrhf.model_paths import check_model_path, model_folder
from rrhf.models.forward.logprobs import inner_model, padded_arguments
from rrhf.models.loading import DEFAULT, LoadOptions, disable_dropout, load_model
from rrhf.models.reward_folders import names_classifier, require_classifier

HEAD = "score"
NORMALIZER_KEY = "rrhf_score_normalizer"
CHAT_FORMAT_KEY = "rrhf_chat_format"


@dataclass(frozen=True)
class ScoreOptions:
    """Where scores are read.

    Attributes:
        per_token: `forward` gives a score at every response position, for token-wise losses.
        first_end_id: read the score at the row's first token of this id (the convention of some
            published models) instead of its last token; rows without one are read at the last.
        reads_padding: with `per_token`, scores after a response's end are wanted too; where they
            are not, a faster layout gives any number there.
    """

    per_token: bool = False
    first_end_id: int | None = None
    reads_padding: bool = True


AT_THE_END = ScoreOptions()
"""One score for each response, read at its last token."""


class RewardModel(nn.Module):
    """A sequence classifier with one label behind the forward interface.

    Args:
        model: a causal model for sequence classification, bare or with adapters.
        options: where scores are read.
    """

    def __init__(self, model: Any, options: ScoreOptions = AT_THE_END) -> None:
        super().__init__()
        self.model, self.options = model, options
        # Scores in bfloat16 would be equal where they should just differ; the head is tiny.
        self._head().float()

    def forward(self, batch: TokenBatch) -> Tensor:
        """Raw scores, float32: [N], or [N, R] (padding included) with `per_token`."""
        ids, mask, position_ids = batch.full_rows()
        hidden = self._hidden(ids, mask, position_ids)  # [N, P + R, H]
        if self.options.per_token:
            return self._apply_head(hidden[:, batch.prompt_ids.shape[1] :])
        rows = torch.arange(len(ids), device=ids.device)
        return self._apply_head(hidden[rows, self._columns(batch, ids, mask)])

    def token_scores(self, batch: TokenBatch) -> Tensor:
        """[N, P + R] float32: the score at every position of the full rows, padding included."""
        return self._apply_head(self._hidden(*batch.full_rows()))

    def scores_before(self, batch: TokenBatch) -> Tensor:
        """[N, R] float32: the score of the state before each response token, padding included."""
        ids, mask, position_ids = (whole[:, :-1] for whole in batch.full_rows())
        hidden = self._hidden(ids, mask, position_ids)
        return self._apply_head(hidden[:, batch.prompt_ids.shape[1] - 1 :])

    def _columns(self, batch: TokenBatch, ids: Tensor, mask: Tensor) -> Tensor:
        """[N] the column of each full row at which its score is read."""
        last = batch.prompt_ids.shape[1] + batch.response_lengths - 1
        if self.options.first_end_id is None:
            return last
        is_end = (ids == self.options.first_end_id) & mask.bool()
        return torch.where(is_end.any(1), is_end.long().argmax(1), last)

    def _hidden(self, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
        trunk = inner_model(self.model).base_model
        outputs = trunk(**padded_arguments(trunk, ids, mask, position_ids))
        hidden: Tensor = outputs.last_hidden_state
        return hidden

    def _apply_head(self, hidden: Tensor) -> Tensor:
        head = self._head()
        # Under sharding, weights may arrive in bfloat16, whatever they are kept in.
        weight = cast(Tensor, head.weight).float()
        bias = None if head.bias is None else cast(Tensor, head.bias).float()
        with torch.autocast(hidden.device.type, enabled=False):
            scores = functional.linear(hidden.float(), weight, bias)
        # No view of it: FSDP2 loses its hook where a caller changes one in place, and says so.
        return scores.squeeze(-1).clone()

    def _head(self) -> nn.Module:
        head: nn.Module = getattr(inner_model(self.model), HEAD)
        return head


def load_reward_model(name_or_path: str | Path, options: LoadOptions = DEFAULT) -> PreTrainedModel:
    """A trained reward model in eval mode; every weight must have been in the folder.

    Raises:
        UserError: no folder, a language model, several labels, a head or other weight is missing.
    """
    config = require_reward_model(name_or_path, options.trust_remote_code)
    model: PreTrainedModel = _load(name_or_path, config, options, is_new=False)
    return model.eval()


def require_reward_model(
    name_or_path: str | Path, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a reward model, without looking at its weights.

    Raises:
        UserError: no folder, a language model, several labels.
    """
    config = _read_config(name_or_path, trust_remote_code)
    require_classifier(name_or_path, config.architectures or ())
    _require_one_label(name_or_path, config)
    return config


def init_reward_model(
    name_or_path: str | Path,
    seed: int,
    pad_id: int | None,
    options: LoadOptions = DEFAULT,
) -> PreTrainedModel:
    """A reward model to train, in float32: a language model with a new head, or a trained one.

    The new head is drawn from N(0, 1 / (H + 1)), as in Stiennon et al. 2020 (arXiv:2009.01325).

    Args:
        name_or_path: a folder or hub name of a causal language model or of a reward model.
        seed: of the new head alone; the global random state has no part in it.
        pad_id: the pad id that the folder will name, None where it would be an end token too:
            then transformers' own head refuses padded batches instead of reading them wrongly.
        options: how it is loaded.

    Raises:
        UserError: no model there, or none that a score head can be put on.
    """
    assert options.dtype == "float32", "trained weights are float32"
    config = _read_config(name_or_path, options.trust_remote_code)
    has_head = names_classifier(config.architectures or ())
    if has_head:
        _require_one_label(name_or_path, config)
    config.num_labels = 1
    config.id2label, config.label2id = {0: HEAD}, {HEAD: 0}
    config.problem_type = "regression"  # makes transformers' pipeline give the score as it is
    config.pad_token_id = pad_id
    model: PreTrainedModel = _load(name_or_path, config, options, is_new=not has_head)
    if not has_head:
        weight = getattr(model, HEAD).weight
        generator = torch.Generator().manual_seed(seed)
        fresh = torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1)
        with torch.no_grad():
            weight.copy_(fresh)
    return model


def score_normalizer(config: PreTrainedConfig) -> Normalizer | None:
    """The normaliser that was learnt with a reward model, or None.

    Raises:
        UserError: the config's entry is not one.
    """
    state = getattr(config, NORMALIZER_KEY, None)
    if state is None:
        return None
    try:
        return normalizer_from_state(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"config.json: {NORMALIZER_KEY} is {state!r:.80}, no normaliser ({error!r}); remove "
            "the key to use raw scores"
        ) from error


def set_score_normalizer(config: PreTrainedConfig, normalizer: Normalizer | None) -> None:
    """Store a normaliser in a reward model's config; None removes it."""
    setattr(config, NORMALIZER_KEY, None if normalizer is None else normalizer.state_dict())


def _read_config(name_or_path: str | Path, trust_remote_code: bool) -> PreTrainedConfig:
    check_model_path(name_or_path)
    folder = model_folder(name_or_path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{name_or_path}: its config.json cannot be read: {error}") from error


def _require_one_label(name_or_path: str | Path, config: PreTrainedConfig) -> None:
    if config.num_labels != 1:
        raise UserError(
            f"{name_or_path}: a classifier with {config.num_labels} labels; a reward model has one "
            "(num_labels 1)"
        )


def _load(
    name_or_path: str | Path,
    config: PreTrainedConfig,
    options: LoadOptions,
    is_new: bool,
) -> Any:
    """Load, and check every key: a head that is silently new gives scores of pure noise."""
    with _quiet_transformers():
        model, info = load_model(
            AutoModelForSequenceClassification,
            name_or_path,
            options,
            config=config,
            output_loading_info=True,
        )
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise UserError(
            f"{name_or_path}: {type(model).__name__} has no linear layer named {HEAD!r}; a reward "
            "model needs a decoder whose classifier has one"
        )
    missing = sorted(info["missing_keys"])
    unexpected = sorted(info["unexpected_keys"])
    if is_new:
        missing = [name for name in missing if not name.startswith(f"{HEAD}.")]
        unexpected = []  # the language model's own head
    if any(name.startswith(f"{HEAD}.") for name in missing):
        raise UserError(
            f"{name_or_path}: a reward model without a head: {missing[0]} is not in its weights; "
            "take the folder that training wrote, or train it again"
        )
    for what, names in (("lacks", missing), ("holds, beyond its model,", unexpected)):
        if names:
            raise UserError(
                f"{name_or_path}: the folder {what} {len(names)} weights (first: {names[0]}); it "
                "was cut, or belongs to another kind of model"
            )
    disable_dropout(model)
    return model


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Context manager: silences its table of missing weights; `_load` reports each of them."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
