"""The stream of a trainer on fixed data, where several processes read the data."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from update_cases import SETS

from rrhf.data.collate import EncodedSet
from rrhf.errors import UserError
from rrhf.training.methods.offline import offline_stream
from rrhf.training.methods.rank_config import RankConfig


def bench_of(config: RankConfig, rank: int, others: list[Any]) -> Any:
    """The second of two processes gets what the first had to say, and the other way round."""

    def gather(rows: list[Any]) -> list[Any]:
        others.append(rows[0])
        return list(others)

    parallel = SimpleNamespace(rank=rank, world_size=2, gather=gather)
    return SimpleNamespace(config=config, parallel=parallel, codec=SimpleNamespace(pad_id=0))


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (SETS, None),
        (SETS[:-1], f"their numbers: {len(SETS)}, {len(SETS) - 1}"),
        (SETS[::-1], f"their numbers: {len(SETS)}, {len(SETS)}"),
    ],
    ids=["the same", "fewer", "another order"],
)
def test_processes_that_read_different_examples_are_refused(
    examples: list[EncodedSet], message: str | None
) -> None:
    config, told = RankConfig("model", "out", data_path="data"), []  # type: ignore[var-annotated]
    offline_stream(bench_of(config, 0, told), SETS, nn.Linear(1, 1))
    second = bench_of(config, 1, told)
    if message is None:
        offline_stream(second, examples, nn.Linear(1, 1))
        return
    with pytest.raises(UserError, match=message):
        offline_stream(second, examples, nn.Linear(1, 1))
