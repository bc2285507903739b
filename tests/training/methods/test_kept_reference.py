"""Log-probs of the reference that are computed once: equal to live ones, resumed, never stale."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import load_dataset
from kills import Zygote
from rank_settings import build_objective, rank_config
from safetensors.torch import load_file, save_file
from tiny import byte_level_tokenizer, save_tiny
from trainer_cases import metrics_of, ranked_rows, same_weights, train_dpo, write_lines
from transformers import LlamaForCausalLM

from rrhf.cli.main import main
from rrhf.data.mixing import load_sets
from rrhf.errors import UserError
from rrhf.stages.part_file import PartAppender
from rrhf.training.core.reference import Reference
from rrhf.training.core.setup import load_trainable_causal_lm, opened_workbench, policy_on_engine
from rrhf.training.methods import rank
from rrhf.training.methods.data_summary import encoded
from rrhf.training.methods.kept_reference import KeptReference, kept_logprobs
from rrhf.training.methods.objectives import OBJECTIVES
from rrhf.training.methods.offline import offline_stream
from rrhf.training.methods.reference_files import folder_of

NUM_PROMPTS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ragged lists; the first has an empty response, which is its EOS alone."""
    rows = ranked_rows(NUM_PROMPTS)
    rows[0]["responses"][1] = ""
    return write_lines(tmp_path / "ranked.jsonl", rows)


def config_of(model: Path, data: Path, out: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "objective": "dpo",
        "data_path": str(data),
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "model_max_length": 100,
        "precompute_ref_log_probs": True,
        **changes,
    }
    return rank_config(str(model), str(out), **values)


@contextlib.contextmanager
def opened(config: Any) -> Iterator[tuple[Any, Any, Any]]:
    """An open run, its policy and its examples, as the trainer makes them."""
    with opened_workbench(config) as bench:
        policy = policy_on_engine(bench, load_trainable_causal_lm(config))
        loss = OBJECTIVES[config.objective].build(config.objective_settings)
        sets = load_sets(config.data_path)
        encode = rank._encoder(config, bench, 128, loss)
        yield bench, policy, encoded(config.data_path, sets, encode)


def keep(model: Path, data: Path, out: Path, **changes: Any) -> Path:
    """Do the pass alone; returns the file that the examples are read from."""
    config = config_of(model, data, out, **changes)
    with opened(config) as (bench, policy, examples):
        found = KeptReference(bench, policy)(examples, config.data_path)
        return Path(found._numbers.filename)


def files_of(data: Path) -> list[Path]:
    return sorted(folder_beside(data).glob("*.f32"))


def folder_beside(data: Path) -> Path:
    return data.parent / ".reference_logprobs" / data.name


@pytest.mark.parametrize(
    ("layout", "humanline"), [("padded", False), ("shared_prefix", False), ("padded", True)]
)
def test_loss_and_gradient_equal_those_of_a_live_reference(
    model: Path, data: Path, tmp_path: Path, layout: str, humanline: bool
) -> None:
    other = save_tiny(tmp_path / "other", seed=5)  # so that the ratios are not all one
    config = config_of(model, data, tmp_path / "run", layout=layout, humanline=humanline)
    elsewhere = config_of(other, data, tmp_path / "elsewhere", layout=layout)
    with opened(elsewhere) as (bench, policy, examples):
        kept = KeptReference(bench, policy)(examples, config.data_path)
        live = Reference(policy, policy, bench.parallel)
        stream = offline_stream(bench, examples, policy).over(kept)
        batches = [batch for step in stream for batch in step][: 1 + NUM_PROMPTS // 3]
    with opened(config) as (bench, policy, _):
        for batch in batches:
            assert (batch.reference_logprobs[~batch.response_mask] == 0).all()
            found = []
            for reference in (live, kept_logprobs):
                policy.zero_grad()
                term = build_objective(config, reference)(policy(batch), batch)["dpo"]
                term.total.backward()
                gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
                found.append((term.total.detach(), gradient))
            (loss, gradient), (kept_loss, kept_gradient) = found
            torch.testing.assert_close(kept_loss, loss, rtol=1e-6, atol=1e-6)
            scale = float(gradient.abs().max().clamp_min(1))
            torch.testing.assert_close(kept_gradient, gradient, rtol=0, atol=1e-6 * scale)


def test_a_run_ends_with_the_weights_of_a_live_one_and_holds_one_model(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: dict[str, int] = {}
    plain = rank.RankObjective.__call__

    def counting(self: Any, outputs: Any, batch: Any) -> Any:
        models[name] = sum(isinstance(o, LlamaForCausalLM) for o in gc.get_objects())
        return plain(self, outputs, batch)

    gc.collect()
    before = sum(isinstance(o, LlamaForCausalLM) for o in gc.get_objects())
    monkeypatch.setattr(rank.RankObjective, "__call__", counting)
    for name, is_kept in (("kept", True), ("live", False)):
        held_out = {"eval_data_path": f"{data}:0.5", "eval_steps": 4}
        gc.collect()
        rank.train(
            config_of(model, data, tmp_path / name, precompute_ref_log_probs=is_kept, **held_out)
        )
    assert models == {"kept": before + 1, "live": before + 2}
    kept, live = metrics_of(tmp_path / "kept"), metrics_of(tmp_path / "live")
    assert [row.keys() for row in kept] == [row.keys() for row in live]
    # Whether the policy ranks a pair rightly hangs on rounding before the first step.
    left_out = {"tokens_per_second", "violated_fraction", "ranking_accuracy"}
    for mine, other in zip(kept, live, strict=True):
        for name in mine.keys() - left_out:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert any("eval_loss" in row for row in kept)
    close = [load_file(tmp_path / run / "policy" / "model.safetensors") for run in models]
    assert all(torch.allclose(close[0][k], close[1][k], atol=1e-4) for k in close[0])
    assert len(files_of(data)) == 2, "one of the training data, one of the held-out data"


def test_what_is_kept_is_used_again(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    first = keep(model, data, tmp_path / "one")
    assert f"reference log-probs of 12 prompts: computed now and kept in {first}" in caplog.text
    caplog.clear()
    monkeypatch.setattr(Reference, "__call__", None)
    rounding = {
        "layout": "padded",
        "per_device_train_batch_size": 5,
        "attn_implementation": "eager",
    }
    training = {"seed": 3, "learning_rate": 1e-4, "beta": 0.5, "gradient_checkpointing": True}
    for number, same in enumerate(({}, rounding, training, {"max_tokens_per_batch": 300})):
        assert keep(model, data, tmp_path / f"again{number}", **same) == first
    assert caplog.text.count(f"reference log-probs of 12 prompts: kept in {first}") == 4


def _other_weights(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 1e-6  # one number of all
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def _other_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] *= 2
    (model / "config.json").write_text(json.dumps(config))


def _other_tokenizer(model: Path) -> None:
    known = len(byte_level_tokenizer())
    tokenizer = byte_level_tokenizer(bos=False)
    assert len(tokenizer) == known
    tokenizer.save_pretrained(model)


def _other_response(model: Path) -> None:
    data = model.parent / "ranked.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[4]["responses"][2] += " x"
    write_lines(data, rows)


CHANGES: dict[str, tuple[Callable[[Path], None] | dict[str, Any], str]] = {
    "weights": (_other_weights, "policies"),
    "config": (_other_config, "policies"),
    "tokenizer": (_other_tokenizer, "examples"),
    "data": (_other_response, "examples"),
    "format": ({"chat_format": "alpaca"}, "examples"),
    "limit": ({"model_max_length": 30}, "examples"),
    "precision": ({"bf16": True}, "precisions"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_stale_is_used(
    model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    mine = shutil.copytree(model, tmp_path / "model")
    first = keep(mine, data, tmp_path / "one")
    caplog.set_level(logging.INFO)
    change, told = CHANGES[what]
    settings = change if isinstance(change, dict) else {}
    if callable(change):
        change(mine)
    second = keep(mine, data, tmp_path / "two", **settings)
    assert second != first and files_of(data) == sorted([first, second])
    assert f"kept in {second}; those there are of other {told}" in caplog.text
    assert keep(mine, data, tmp_path / "three", **settings) == second


def test_numbers_are_those_of_each_row_alone(model: Path, data: Path, tmp_path: Path) -> None:
    config = config_of(model, data, tmp_path / "run", max_tokens_per_batch=200)
    with opened(config) as (bench, policy, examples):
        kept = KeptReference(bench, policy)(examples, str(data))
        plain = LlamaForCausalLM.from_pretrained(model).eval()
        assert len(kept) == NUM_PROMPTS and len(kept[1:3]) == 2
        for example in kept:
            for ids, numbers in zip(example.response_ids, example.reference_logprobs, strict=True):
                row = torch.tensor([[*example.prompt_ids, *ids]])
                with torch.no_grad():
                    logs = plain(row).logits[0].log_softmax(-1)
                begin = len(example.prompt_ids)
                wanted = [logs[begin + i - 1, token] for i, token in enumerate(ids)]
                assert numbers.tolist() == pytest.approx([float(w) for w in wanted], abs=1e-5)


class PowerCut(Exception):
    pass


@pytest.mark.parametrize("budget", [None, 60])
def test_a_pass_that_was_cut_is_continued(
    model: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: int | None,
) -> None:
    same = {"max_tokens_per_batch": budget}
    elsewhere = shutil.copy(data, tmp_path / "copy.jsonl")
    straight = keep(model, elsewhere, tmp_path / "straight", **same)
    rows: list[int] = []
    plain = Reference.__call__

    def cut(self: Any, batch: Any) -> torch.Tensor:
        if len(rows) == 2:
            raise PowerCut
        rows.append(batch.num_prompts)
        return plain(self, batch)

    monkeypatch.setattr(Reference, "__call__", cut)
    with pytest.raises(PowerCut):
        keep(model, data, tmp_path / "cut", **same)
    assert not files_of(data)
    first, rows = list(rows), []
    monkeypatch.setattr(
        Reference,
        "__call__",
        lambda self, batch: rows.append(batch.num_prompts) or plain(self, batch),
    )
    found = keep(model, data, tmp_path / "again", **same)
    assert sum(first) + sum(rows) == NUM_PROMPTS, "nothing is computed twice"
    numbers = [np.fromfile(file, "<f4") for file in (found, straight)]
    np.testing.assert_allclose(*numbers, atol=1e-5)
    assert sorted(path.name for path in found.parent.iterdir()) == [
        found.name,
        f"{found.name}.manifest.json",
    ]


def test_a_killed_run_is_continued(model: Path, data: Path, tmp_path: Path) -> None:
    straight = keep(model, shutil.copy(data, tmp_path / "copy.jsonl"), tmp_path / "straight")
    run = tmp_path / "run"
    settings = {"model": str(model), "data": str(data), "output_dir": str(run)}
    with Zygote("trainer_cases:train_dpo", settings) as zygote:
        third = ("rrhf.training.core.reference:Reference.__call__", 3)
        assert zygote.run(kill_at_call=third)["signal"] == signal.SIGKILL
        assert not files_of(data)
        assert zygote.run()["exit"] == 0
    read = (tmp_path / "run.rank0").read_text().split()
    assert read == ["3"] * 5, "of four batches, the one of the kill is read twice"
    assert files_of(data)[0].read_bytes() == straight.read_bytes()
    assert metrics_of(run)[-1]["step"] == 4


def test_sigterm_stops_the_pass_and_the_same_command_goes_on(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["train", "dpo", "--model_name_or_path", str(model), "--data_path", str(data)]
    flags += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2"]
    flags += ["--precompute_ref_log_probs", "--model_max_length", "100"]
    plain, calls = Reference.__call__, []

    def stopped(self: Any, batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, batch)

    monkeypatch.setattr(Reference, "__call__", stopped)
    assert main(flags) == 75
    assert len(calls) == 1
    assert main(flags) == 0
    assert len(calls) == 2, "the second of the two prompts that two steps use"


@pytest.mark.parametrize("fault", ["flipped", "cut", "removed"])
def test_a_damaged_file_is_made_again(
    model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    file = keep(model, data, tmp_path / "one")
    whole = file.read_bytes()
    if fault == "removed":
        file.unlink()
    else:
        file.write_bytes(whole[:-4] if fault == "cut" else b"\x00" + whole[1:])
    assert keep(model, data, tmp_path / "two") == file
    assert file.read_bytes() == whole
    assert f"{file}: is " in caplog.text and "computing it again" in caplog.text


def test_a_short_run_computes_only_what_it_uses(model: Path, data: Path, tmp_path: Path) -> None:
    for name, is_kept in (("kept", True), ("live", False)):
        changes = {"max_steps": 2, "precompute_ref_log_probs": is_kept}
        rank.train(config_of(model, data, tmp_path / name, **changes))
    (file,) = files_of(data)
    assert json.loads(Path(f"{file}.manifest.json").read_text())["prompts"] == 6
    kept, live = (metrics_of(tmp_path / name) for name in ("kept", "live"))
    assert [row["loss"] for row in kept] == pytest.approx([row["loss"] for row in live], abs=1e-5)


def test_the_survey_of_a_short_run_gives_the_same_file(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where lengths are unknown at the start, the ids of the used examples are hashed."""
    rank.train(config_of(model, data, tmp_path / "one", max_steps=2))
    monkeypatch.setattr("rrhf.training.methods.rank.is_short", lambda bench, count: True)
    rank.train(config_of(model, data, tmp_path / "two", max_steps=2))
    assert len(files_of(data)) == 1
    assert same_weights(tmp_path / "one" / "policy", tmp_path / "two" / "policy")


def test_a_resumed_run_ends_in_the_same_bits(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank.train(config_of(model, data, tmp_path / "straight"))
    plain, calls = rank.RankObjective.__call__, iter(range(100))

    def failing(self: Any, outputs: Any, batch: Any) -> Any:
        if next(calls) == 4:
            raise PowerCut
        return plain(self, outputs, batch)

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(rank.RankObjective, "__call__", failing)
        rank.train(config_of(model, data, tmp_path / "cut", save_steps=2))
    for file in folder_beside(data).iterdir():
        file.unlink()  # what was kept is lost: the policy at the start of the run makes it again
    resumed = {"save_steps": 2, "resume_from_checkpoint": True}
    rank.train(config_of(model, data, tmp_path / "cut", **resumed))
    assert same_weights(tmp_path / "straight" / "policy", tmp_path / "cut" / "policy")


def test_adapters_are_off_in_the_pass(model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = keep(model, data, tmp_path / "plain")
    numbers = np.fromfile(plain, "<f4")
    assert keep(model, data, tmp_path / "lora", use_lora=True) == plain
    for file in plain.parent.iterdir():
        file.unlink()
    config = config_of(model, data, tmp_path / "again", use_lora=True)
    with opened(config) as (bench, policy, examples):
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        KeptReference(bench, policy)(examples, str(data))
    np.testing.assert_allclose(np.fromfile(plain, "<f4"), numbers, atol=1e-6)


def test_two_ranks_share_the_work(model: Path, data: Path, tmp_path: Path) -> None:
    copied = str(shutil.copy(data, tmp_path / "copy.jsonl"))
    train_dpo(str(model), copied, str(tmp_path / "one"))
    settings = {"model": str(model), "data": str(data), "output_dir": str(tmp_path / "two")}
    settings["gradient_accumulation_steps"] = 1
    with Zygote("trainer_cases:train_dpo", settings) as zygote:
        assert zygote.run_ranks() == [0, 0]
    read = [(tmp_path / f"two.rank{rank}").read_text().split() for rank in (0, 1)]
    assert read == [["3", "3"], ["3", "3"]]
    (one,), (two,) = files_of(Path(copied)), files_of(data)
    assert one.name == two.name and len(list(two.parent.iterdir())) == 2
    np.testing.assert_allclose(np.fromfile(one, "<f4"), np.fromfile(two, "<f4"), atol=1e-5)
    losses = ([row["loss"] for row in metrics_of(tmp_path / run)] for run in ("one", "two"))
    assert next(losses) == pytest.approx(next(losses), rel=1e-4)


def test_a_run_waits_for_another_that_computes_the_same(
    model: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    wanted = keep(model, shutil.copy(data, tmp_path / "copy.jsonl"), tmp_path / "one").name
    folder = folder_beside(data)
    folder.mkdir(parents=True)
    with PartAppender(folder / f"{wanted}.rank0.jsonl") as part:
        ends = threading.Timer(0.7, part.close)
        ends.start()
        assert keep(model, data, tmp_path / "two").name == wanted
        ends.join()
    assert "another run is computing this file; waiting" in caplog.text


def test_a_reference_that_is_not_finite_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"not finite \(first: training example 0\)"):
        keep(broken, data, tmp_path / "run", layout="padded")
    assert not files_of(data)


def test_an_objective_without_a_reference_refuses_the_flag(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", str(model), "--data_path", str(data)]
    flags += ["--output_dir", str(tmp_path / "run"), "--precompute_ref_log_probs"]
    assert main(["train", "rank", *flags]) == 2
    assert "--objective rrhf uses no reference; leave the flag out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_where_files_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = tmp_path / "a.jsonl", tmp_path / "run"
    data.touch()
    with_data = tmp_path / ".reference_logprobs" / "a.jsonl"
    assert folder_of(str(data), run) == with_data
    assert folder_of(f"hh:10/-1,{data}:0.5", run) == with_data
    assert folder_of("hh", run) == run / ".reference_logprobs"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert folder_of(str(data), run) == run / ".reference_logprobs"
    with_data.mkdir(parents=True)
    assert folder_of(str(data), run) == with_data, "what is kept there is read"


def test_the_folder_of_the_data_reads_as_before(model: Path, data: Path, tmp_path: Path) -> None:
    """Programs that read all files of a folder must not find those that are kept there."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.move(data, folder / "train.jsonl")
    keep(model, folder / "train.jsonl", tmp_path / "run")
    assert files_of(folder / "train.jsonl")
    found = load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    assert found.num_rows == NUM_PROMPTS and set(found.column_names) == set(ranked_rows(1)[0])
