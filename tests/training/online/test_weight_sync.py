"""What a failure on one rank of a rollout does to the others; two ranks by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rrhf.errors import LostRank, UserError
from rrhf.generation.engine import SamplingParams
from rrhf.signals import StopRequest
from rrhf.training.online.weight_sync import LostSampler, WeightSync


class Ranks:
    """This rank and one other, which answers every exchange with `other`."""

    def __init__(self, is_main: bool, other: tuple[str, str, str] = ("", "", "")) -> None:
        self.is_main, self.other, self.exchanges = is_main, other, list[str]()

    def gather(self, rows: list[Any]) -> list[Any]:
        self.exchanges.append("gather")
        return [*rows, self.other]

    def max(self, value: float) -> float:
        self.exchanges.append("max")
        return value


class Model:
    def __init__(self, head: torch.nn.Module | None = None) -> None:
        self._head = head or torch.nn.Linear(1, 1)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self._head


class Engine:
    retries = 0

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder

    def sync_folder(self) -> Path | None:
        return self._folder

    def describe(self) -> dict[str, str]:
        return {"engine": "by hand"}


def sync(ranks: Ranks, folder: Path, engine: Any = None, model: Any = None) -> WeightSync:
    parts: Any = engine or Engine(), model or Model(), 1.0, folder, ranks, StopRequest()
    return WeightSync(*parts)


def answers(its: WeightSync) -> None:
    its.answers([], SamplingParams())


def test_a_folder_that_cannot_be_written_is_one_message_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ranks = Ranks(is_main=True)
    with pytest.raises(LostSampler, match=r"file.*cannot be written"):
        answers(sync(ranks, tmp_path, Engine(tmp_path / "file" / "weights")))
    assert ranks.exchanges == ["gather", "max"]


def test_what_nobody_foresaw_leaves_no_rank_waiting(tmp_path: Path) -> None:
    """The main rank raises it after every exchange that the other ranks are in."""
    ranks = Ranks(is_main=True)
    with pytest.raises(AttributeError, match="state_dict"):
        answers(sync(ranks, tmp_path))
    assert ranks.exchanges == ["gather", "max"]
    ranks = Ranks(is_main=False, other=("", "", "AttributeError('no state_dict')"))
    with pytest.raises(LostRank, match=r"another process failed: .*no state_dict"):
        answers(sync(ranks, tmp_path))
    assert ranks.exchanges == ["gather", "max"]


def test_a_model_without_a_plain_output_layer_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a plain linear layer.*--engine local"):
        sync(Ranks(is_main=True), tmp_path, model=Model(torch.nn.Identity()))
