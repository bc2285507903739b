"""Engines in training: the same run as with padded rows, on one process and spread over two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from kills import Zygote
from tiny import save_tiny
from torch import nn
from trainer_cases import metrics_of, ranked_rows, train, write_lines

from rrhf.errors import UserError
from rrhf.training.methods.sft import SFTConfig


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "ranked.jsonl", ranked_rows())


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True, "use_lora": True}])
def test_a_run_is_the_run_of_padded_rows(
    changes: dict[str, Any],
    model_folder: Path,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Step by step, as far as float32 lets two orders of the same sums go together."""
    caplog.set_level("INFO", "rrhf.models.forward.self_check")
    runs = {}
    for layout in ("padded", "auto"):
        out = tmp_path / layout
        settings = {"num_train_epochs": 1, "learning_rate": 1e-3, "layout": layout, **changes}
        train("rank", str(model_folder), str(data), str(out), **settings)
        runs[layout] = [row for row in metrics_of(out) if "loss" in row]
    said = [record.getMessage() for record in caplog.records if record.name.endswith("self_check")]
    assert said == ["layout: LlamaForCausalLM uses shared_prefix over sdpa"]
    assert len(runs["auto"]) == len(runs["padded"]) > 1
    for found, expected in zip(runs["auto"], runs["padded"], strict=True):
        for name in ("loss", "rank_loss", "sft_loss", "grad_norm", "score_margin"):
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)
    saved = (
        [json.loads((tmp_path / e / "policy" / "config.json").read_text()) for e in runs]
        if not changes
        else [1, 1]
    )
    assert saved[0] == saved[1]


def test_engines_that_would_be_ignored_are_refused() -> None:
    with pytest.raises(UserError, match="--packing and --layout dense_mask"):
        SFTConfig("", "", data_path="", packing=True, layout="dense_mask")


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The gradient of every case on two ranks, from processes of their own."""
    out = tmp_path_factory.mktemp("ranks")
    with Zygote("two_ranks:rank_of_two", {"out": str(out)}) as zygote:
        assert zygote.run_ranks() == [0, 0]
    return dict(torch.load(out / "gradients.pt"))


@pytest.mark.parametrize("make", [two_ranks.policy, two_ranks.reward_model])
@pytest.mark.parametrize("spread", ["ddp", "fsdp"])
@pytest.mark.parametrize("layout", ["shared_prefix", "dense_mask"])
def test_two_processes_have_the_mean_gradient_of_padded_rows(
    make: Callable[[str], nn.Module], spread: str, layout: str, gradients: dict[str, torch.Tensor]
) -> None:
    model = make("padded")
    for rank in range(2):
        (two_ranks.loss(model, rank) / 2).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found = gradients[f"{make.__name__} {spread} {layout}"]
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_flash_attention_needs_half_precision(tmp_path: Path) -> None:
    """Said before anything is loaded or written."""
    with pytest.raises(UserError, match=r"--attn_implementation flash_attention_2: .* add --bf16"):
        train("rank", "m", "d", str(tmp_path / "o"), attn_implementation="flash_attention_2")
    assert not (tmp_path / "o").exists()
