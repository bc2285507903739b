"""Trainings on the device: near the CPU's, bfloat16 near float32, memory that comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_tiny
from trainer_cases import metrics_of, ranked_rows, write_lines

from rrhf.training.core.offload import HostStore
from rrhf.training.core.parallel import Parallel
from rrhf.training.methods import rank


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    return {
        "model_name_or_path": str(save_tiny(tmp_path / "model")),
        "data_path": str(write_lines(tmp_path / "ranked.jsonl", ranked_rows(12))),
        "model_max_length": 100,
        "per_device_train_batch_size": 3,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "save_steps": 0,
    }


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run) if "loss" in row]


def test_every_engine_trains_alike(data: dict[str, Any], tmp_path: Path, device: str) -> None:
    """Eight steps in float32; the first losses agree to rounding, later ones to what Adam makes."""
    layouts = ["padded", "shared_prefix", "dense_mask"]
    found = {}
    for layout in layouts:
        run = tmp_path / layout
        rank.train(rank.RankConfig(output_dir=str(run), layout=layout, **data))
        found[layout] = losses(run)
    for layout in layouts[1:]:
        assert found[layout][0] == pytest.approx(found["padded"][0], rel=1e-5)
        assert found[layout] == pytest.approx(found["padded"], rel=1e-2)


def test_bfloat16_trains_near_float32(data: dict[str, Any], tmp_path: Path, device: str) -> None:
    """Masters stay float32, and losses within the three digits that bfloat16 has."""
    found = {}
    layouts = ["auto"] + (["varlen_attention"] if device == "cuda" else [])
    rank.train(rank.RankConfig(output_dir=str(tmp_path / "exact"), **data))
    for layout in layouts:
        run = tmp_path / layout
        rank.train(rank.RankConfig(output_dir=str(run), layout=layout, bf16=True, **data))
        found[layout] = losses(run)
        weights = load_file(run / "policy" / "model.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float32}
    exact = losses(tmp_path / "exact")
    for layout in layouts:
        assert found[layout][0] == pytest.approx(exact[0], rel=2e-2), layout
        assert found[layout] == pytest.approx(exact, rel=0.1, abs=0.05), layout


def test_it_computes_where_the_device_is(device: str) -> None:
    assert Parallel(bf16=True).device.type == device


def test_what_is_off_a_gpu_keeps_its_bits(device: str) -> None:
    store = HostStore(torch.device(device))
    torch.manual_seed(0)
    tensor = torch.randn(1 << 20, device=device).view(1 << 10, 1 << 10)
    there = store.put("weights", tensor)
    if device == "cuda":
        assert there.is_pinned() and there.device.type == "cpu"
    assert torch.equal(there, tensor.cpu())
    back = store.fetch(there)
    assert back.device.type == device and torch.equal(back, tensor)
    back.add_(1)
    assert torch.equal(store.kept("weights"), tensor.cpu())
    store.close()


def test_memory_is_given_back(cuda: str) -> None:
    store = HostStore(torch.device(cuda))
    before = torch.cuda.memory_allocated()
    tensor = torch.ones(1 << 24, device=cuda)
    there = store.put("weights", tensor)
    del tensor
    assert torch.cuda.memory_allocated() == before
    back = store.fetch(there)
    assert torch.cuda.memory_allocated() > before and bool((back == 1).all())


def test_random_states_of_the_device_come_back(tmp_path: Path, device: str) -> None:
    """What a checkpoint keeps of the generators makes the next draws the same."""
    from rrhf.training.core.checkpoint import _random_state, _set_random_state

    torch.manual_seed(4)
    torch.rand(3, device=device)
    state = _random_state()
    first = (torch.rand(5, device=device), torch.rand(5))
    torch.manual_seed(9)
    _set_random_state(state)
    again = (torch.rand(5, device=device), torch.rand(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
