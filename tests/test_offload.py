"""Offloading: what moves when, that no bit changes, and that the memory is really given up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import Zygote
from ppo_cases import build_world, save_demonstrations, settings, without_clock
from torch import Tensor, nn
from trainer_cases import metrics_of, same_weights

from rrhf.errors import UserError
from rrhf.training.core.offload import (
    FileStore,
    HostStore,
    Offload,
    build_store,
)
from rrhf.training.core.offload_levels import LEVELS, parse_levels
from rrhf.training.core.tracking import Tracker
from rrhf.training.online import ppo

COMBINATIONS = [
    "freeze_model",
    "optimizer",
    "train_model",
    "freeze_model optimizer",
    "freeze_model train_model",
    "optimizer train_model",
    "freeze_model optimizer train_model",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


# ---- the mechanism -----------------------------------------------------------------------------


class RecordingStore:
    """Keeps copies, and notes what comes and goes."""

    where = "a list"

    def __init__(self) -> None:
        self.kept_tensors: dict[str, Tensor] = {}
        self.notes: list[str] = []

    def put(self, name: str, tensor: Tensor) -> Tensor:
        self.notes.append(f"put {name}")
        self.kept_tensors[name] = tensor.clone()
        return self.kept_tensors[name]

    def kept(self, name: str, like: Tensor) -> Tensor:
        self.notes.append(f"kept {name}")
        return self.kept_tensors[name]

    def fetch(self, tensor: Tensor, is_constant: bool) -> Tensor:
        self.notes.append("fetch constant" if is_constant else "fetch")
        return tensor.clone()

    def close(self) -> None:
        self.notes.append("close")

    def take(self) -> list[str]:
        notes, self.notes = self.notes, []
        return notes


def test_each_phase_finds_what_it_needs_and_nothing_moves_for_nothing() -> None:
    store = RecordingStore()
    offload = Offload(LEVELS, store)
    frozen, trained = nn.Linear(2, 1, bias=False), nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.AdamW(trained.parameters())
    offload.add_frozen(frozen, {"score"})
    offload.add_trained(trained, {"generate", "train"})
    offload.begin(Tracker(), optimizer)
    assert store.take() == ["put 0-0"]  # a frozen model goes at once
    offload.enter("generate")
    assert store.take() == []
    offload.enter("score")
    assert store.take() == ["put 1-0", "fetch constant"]  # out first, then in
    offload.enter("train")
    assert store.take() == ["kept 0-0", "fetch"]  # a frozen model is written once
    trained(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    offload.enter("generate")
    assert store.take() == ["put optimizer-0", "put optimizer-1"]
    offload.enter("score")
    assert store.take() == ["put 1-0", "fetch constant"]  # it was trained, so it is written anew
    offload.enter("generate")
    assert store.take() == ["kept 0-0", "fetch"]
    offload.enter("score")
    assert store.take() == ["kept 1-0", "fetch constant"]  # but not without a step between
    offload.enter("train")
    assert store.take() == ["kept 0-0", "fetch", "fetch", "fetch"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_moves_its_own_alone(level: str) -> None:
    store = RecordingStore()
    offload = Offload({level}, store)
    trained = nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.AdamW(trained.parameters())
    trained(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    offload.add_frozen(nn.Linear(2, 1, bias=False), {"score"})
    offload.add_trained(trained, {"train"})
    offload.begin(Tracker(), optimizer)
    offload.enter("generate")
    puts = {"freeze_model": 1, "optimizer": 2, "train_model": 1}
    assert len(store.take()) == puts[level]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("kind", ["files", "host"])
def test_a_store_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    device = torch.device("cpu")
    store = HostStore(device) if kind == "host" else build_store(device, tmp_path / "off")
    tensor = torch.randint(-9, 9, (3, 5)).to(dtype) / (1 if dtype == torch.int64 else 7)
    tensor = tensor.to(dtype)
    off = store.put("a", tensor)
    later = store.put("a", tensor + 1)
    back = store.fetch(later, is_constant=False)
    back.zero_()
    assert torch.equal(later, tensor + 1) and later.dtype == dtype
    assert torch.equal(store.kept("a", tensor), tensor + 1)
    if kind == "files":
        assert torch.equal(off, tensor), "an older mapping keeps the older file"
    store.close()
    assert not (tmp_path / "off").exists()
    if kind == "files":
        assert torch.equal(later, tensor + 1), "what is mapped stays readable"


@pytest.mark.parametrize("place", [0, 16, 48])
def test_a_tensor_keeps_its_place_within_a_line_of_the_cache(tmp_path: Path, place: int) -> None:
    """Weights that begin elsewhere were seen to give scores that differ in the eighth digit."""
    room = torch.empty(400, dtype=torch.uint8)
    start = (place - room.data_ptr()) % 64
    tensor = room[start : start + 80].view(torch.float32).copy_(torch.arange(20.0))
    store = FileStore(tmp_path / "off")
    off = store.put("a", tensor)
    back = store.fetch(off, is_constant=False)
    again = store.kept("a", back)
    for one in (tensor, off, back, again):
        assert one.data_ptr() % 64 == place and torch.equal(one, torch.arange(20.0))


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    FileStore(tmp_path / "off").put("a", torch.ones(3))
    assert (tmp_path / "off" / "a").is_file()
    FileStore(tmp_path / "off")
    assert not (tmp_path / "off").exists()


def test_tied_weights_come_once_and_odd_layouts_stay() -> None:
    store = RecordingStore()
    module = nn.Linear(2, 3, bias=False)
    module.tied = module.weight
    module.turned = nn.Parameter(torch.ones(2, 3).T)
    Offload(LEVELS, store).add_frozen(module, {"score"})
    assert store.take() == ["put 0-0"]


@pytest.mark.parametrize(
    ("words", "levels"),
    [
        ([], set()),
        (["none"], set()),
        (["freeze_model optimizer train_model"], set(LEVELS)),
        (["train_model", "optimizer"], {"train_model", "optimizer"}),
    ],
)
def test_levels_are_read_in_one_string_or_several(words: list[str], levels: set[str]) -> None:
    assert parse_levels(words) == levels


@pytest.mark.parametrize("words", [["freeze"], ["none optimizer"]])
def test_unknown_levels_are_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="offload_level"):
        parse_levels(words)


# ---- whole runs --------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["two-trunks", "one-trunk", "lora"])
def test_no_combination_changes_a_bit(world: Path, tmp_path: Path, change: str) -> None:
    """Metrics, weights, average and optimiser, with demonstrations, an average, an evaluation."""
    changes: dict[str, Any] = {"eval_steps": 3, "eval_datasets": str(world / "prompts.jsonl")}
    combinations = COMBINATIONS
    if change == "one-trunk":
        changes |= {"share_trunk": True, "use_ema": True, "ema_beta": 0.9}
        changes |= {"ptx_datasets": str(save_demonstrations(tmp_path)), "ptx_coeff": 0.5}
        combinations = COMBINATIONS[-1:]
    if change == "lora":
        pytest.importorskip("peft")
        changes |= {"use_lora": True, "lora_r": 2}
        combinations = COMBINATIONS[-1:]
    shared = {"num_rollouts": 2, "ppo_epochs": 1, "save_steps": 4, **changes}
    ppo.train(settings(world, tmp_path / "plain", **shared))
    for place, levels in enumerate(combinations):
        run = tmp_path / str(place)
        ppo.train(settings(world, run, offload_level=[levels], **shared))
        assert not list(run.glob(".offload*"))
        assert_same(run, tmp_path / "plain")
        assert all("peak_mib_offload" in row for row in metrics_of(run) if "score" in row)


def assert_same(one: Path, two: Path) -> None:
    rows = [[without_clock(row) for row in metrics_of(run)] for run in (one, two)]
    assert rows[0] == rows[1]
    for folder in ("policy", "value", "policy_ema"):
        if (two / folder).exists():
            assert same_weights(one / folder, two / folder)
    states = [
        torch.load(run / "checkpoints" / "step-4" / "optimizer.pt", weights_only=True)
        for run in (one, two)
    ]
    mine, its = (dict(state["state"]) for state in states)
    assert mine.keys() == its.keys() and mine
    for place, state in mine.items():
        assert all(torch.equal(value, its[place][name]) for name, value in state.items())


def test_killed_with_everything_off_and_resumed_without(world: Path, tmp_path: Path) -> None:
    """The checkpoint of a run whose weights lie elsewhere is a checkpoint like any other."""
    shared = {"num_rollouts": 2, "ppo_epochs": 1, "save_steps": 1}
    ppo.train(settings(world, tmp_path / "plain", **shared))
    arguments = {"world": str(world), "output_dir": str(tmp_path / "run"), **shared}
    levels = [COMBINATIONS[-1]]
    with Zygote("ppo_cases:train_again", {**arguments, "offload_level": levels}) as zygote:
        answer = zygote.run(kill_at_operation=40, folder=tmp_path / "run" / "checkpoints")
    assert answer["signal"] == 9
    ppo.train(settings(world, tmp_path / "run", resume_from_checkpoint=True, **shared))
    assert_same(tmp_path / "run", tmp_path / "plain")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_memory_is_given_up(tmp_path: Path) -> None:
    """64 MiB of weights, measured in a process of its own."""
    with Zygote("offload_cases:measure", {"folder": str(tmp_path)}) as zygote:
        assert zygote.run()["exit"] == 0
    peak = json.loads((tmp_path / "peaks.json").read_text())
    assert peak["without"] - peak["away"] > 60
    assert peak["back"] - peak["away"] > 60
