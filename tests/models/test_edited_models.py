"""A model that is not as its run left it is refused, unless the user says that it was meant."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from damage import (
    Damage,
    added,
    cut,
    delisted,
    flipped,
    grown,
    made_a_folder,
    manifest_damages,
    removed,
    replaced_by_other_weights,
)
from ppo_cases import build_world, save_runs, settings

from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.model_paths import check_model_path, require_as_written
from rrhf.models.loading import load_causal_lm, load_tokenizer
from rrhf.models.reward_model import load_reward_model
from rrhf.sealed_folders import damage_of
from rrhf.training.core.best import BestModel
from rrhf.training.core.parallel import Parallel
from rrhf.training.online import ppo

torch.set_num_threads(1)

TRAINING = ["--model_max_length", "100", "--max_steps", "1", "--learning_rate", "1e-2"]

DAMAGES: dict[str, Damage] = {
    **manifest_damages("model.safetensors"),
    "an exponent flipped": flipped("model.safetensors", 0.9),
    "weights' header flipped": flipped("model.safetensors", 0.01),
    "weights cut": cut("model.safetensors"),
    "weights grown": grown("model.safetensors"),
    "other weights": replaced_by_other_weights("model.safetensors"),
    "weights a folder": made_a_folder("model.safetensors"),
    "config flipped": flipped("config.json"),
    "config cut": cut("config.json"),
    "tokenizer flipped": flipped("tokenizer.json"),
    "tokenizer's config flipped": flipped("tokenizer_config.json"),
    "generation config removed": removed("generation_config.json"),
    "tokenizer removed": removed("tokenizer.json"),
    "weights not listed": delisted("model.safetensors"),
    "an adapter added": added("adapter_config.json"),
    "more weights added": added("model-00002-of-00002.safetensors"),
    "pickled weights added": added("pytorch_model.bin"),
    "a template added": added("chat_template.jinja", b"{{ messages }}"),
    "a vocabulary added": added("vocab.json"),
    "merges added": added("merges.txt"),
    "a list of words added": added("vocab.txt"),
    "special tokens added": added("added_tokens.json"),
    "an index of weights added": added("model.safetensors.index.json"),
    "a versioned tokenizer added": added("tokenizer.4.0.json"),
    "code added": added("modeling.py", b"import os"),
}


def do(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/ of another program, data, and the runs policy/ and reward/."""
    runs = {"policy": "rank", "reward": "reward"}
    return save_runs(tmp_path_factory.mktemp("world"), runs, TRAINING)


def copied(world: Path, run: str, to: Path) -> Path:
    """A copy of the model that a run left."""
    name = "policy" if run == "policy" else "reward_model"
    shutil.copytree(world / run / name, to / "copy" / name)
    return to / "copy" / name


@pytest.mark.parametrize("run", ["policy", "reward"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_no_difference_goes_unseen(kind: str, run: str, world: Path, tmp_path: Path) -> None:
    if run == "reward" and kind == "generation config removed":
        pytest.skip("reward models have none")
    folder = copied(world, run, tmp_path)
    require_as_written(folder)
    DAMAGES[kind](folder)
    load = load_causal_lm if run == "policy" else load_reward_model
    with pytest.raises(UserError, match=r"is not as its manifest\.json describes it: ") as told:
        load(folder)
    assert "--accept_edited_files" in str(told.value)
    assert f"remove {folder}/manifest.json" in str(told.value)


def test_many_kinds_are_tried() -> None:
    assert len(DAMAGES) >= 35


@pytest.mark.parametrize("kind", ["tokenizer flipped", "config flipped", "weights cut"])
def test_small_files_and_sizes_are_looked_at_first(
    kind: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a weight is read, as soon as the folder is named or its tokenizer loaded."""
    folder = copied(world, "policy", tmp_path)
    DAMAGES[kind](folder)
    read: list[str] = []
    monkeypatch.setattr(
        "rrhf.sealed_folders.sha256_file", lambda path: read.append(path.name) or "no digest"
    )
    for look in (check_model_path, load_tokenizer):
        with pytest.raises(UserError, match="is not as its"):
            look(folder)
    assert "model.safetensors" not in read


def test_what_no_loader_reads_may_be_added(world: Path, tmp_path: Path) -> None:
    folder = copied(world, "policy", tmp_path)
    (folder / "eval").mkdir()
    for name in (
        *("README.md", "LICENSE", "loss.png", ".DS_Store", ".config.json.swp"),
        *("notes.txt", "notes.json", "requirements.txt", "eval/results.json"),
    ):
        (folder / name).write_text("of the user's own")
    assert load_causal_lm(folder).num_parameters() > 0


def test_folders_of_others_load_as_ever(world: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(world / "model", tmp_path / "model")
    for text in ("[1]", '{"files": ["a", "b"]}', '{"version": 3, "status": "draft"}'):
        (folder / "manifest.json").write_text(text)
        assert load_causal_lm(folder).num_parameters() > 0


def test_several_differences_are_named(world: Path, tmp_path: Path) -> None:
    folder = copied(world, "policy", tmp_path)
    for kind in (
        "config flipped",
        "tokenizer flipped",
        "weights cut",
        "tokenizer's config flipped",
    ):
        DAMAGES[kind](folder)
    with pytest.raises(UserError) as told:
        load_causal_lm(folder)
    assert "config.json has other bytes than were written; model.safetensors has" in str(told.value)
    assert "; and 1 more." in str(told.value)


# Every command that loads a model.

Words = list[object]


def generate(model: Path, world: Path, out: Path) -> Words:
    return [
        *["generate", "--model_name_or_path", model, "--prompts", world / "prompts.jsonl"],
        *["--output_file", out / "x.jsonl", "--max_new_tokens", 4, "--chat_format", "raw"],
    ]


def score(model: Path, world: Path, out: Path) -> Words:
    return ["score", world / "data.jsonl", out / "scored.jsonl", "--scorer", model]


def response_gen(model: Path, world: Path, out: Path) -> Words:
    prompts = ["--prompts", world / "prompts.jsonl", "--max_new_tokens", 4]
    scorer = ["--scorer", world / "reward"]
    return ["response-gen", model, out / "both", *prompts, *scorer, "--chat_format", "raw"]


def response_gen_scorer(model: Path, world: Path, out: Path) -> Words:
    words = response_gen(world / "model", world, out)
    return [model if word == world / "reward" else word for word in words]


def evaluate(*flags: str) -> Callable[[Path, Path, Path], Words]:
    def words(model: Path, world: Path, out: Path) -> Words:
        policy = (
            [] if "--model_name_or_path" in flags else ["--model_name_or_path", world / "model"]
        )
        return [
            *["evaluate", "--prompts", world / "prompts.jsonl", "--output_dir", out / "rows"],
            *["--max_new_tokens", 4, "--chat_format", "raw", "--decoding", "sample", *policy],
            *(word for flag in flags for word in (flag, model)),
        ]

    return words


def train(stage: str) -> Callable[[Path, Path, Path], Words]:
    def words(model: Path, world: Path, out: Path) -> Words:
        data = ["--data_path", world / "data.jsonl", "--output_dir", out / "run", *TRAINING]
        return ["train", stage, "--model_name_or_path", model, *data]

    return words


def online(stage: str, flag: str) -> Callable[[Path, Path, Path], Words]:
    def words(model: Path, world: Path, out: Path) -> Words:
        models = {
            "--model_name_or_path": world / "model",
            "--reward_model_name_or_path": world / "reward",
            flag: model,
        }
        given = [word for pair in models.items() for word in pair]
        sizes = ["--rollout_size", 4] if stage == "ppo" else ["--num_rounds", 1]
        data = ["--train_datasets", world / "prompts.jsonl", "--output_dir", out / "run"]
        short = ["--max_new_tokens", 4, "--chat_format", "raw"]
        return ["train", stage, *given, *data, *short, *sizes, *TRAINING]

    return words


COMMANDS: dict[str, tuple[str, Callable[[Path, Path, Path], Words]]] = {
    "generate": ("policy", generate),
    "score": ("reward", score),
    "response-gen": ("policy", response_gen),
    "response-gen, scorer": ("reward", response_gen_scorer),
    "evaluate": ("policy", evaluate("--model_name_or_path")),
    "evaluate, reference": ("policy", evaluate("--reference_model_name_or_path")),
    "evaluate, perplexity": ("policy", evaluate("--ppl_model_name_or_path")),
    "evaluate, baseline": ("policy", evaluate("--baseline")),
    "evaluate, scorer": ("reward", evaluate("--scorer")),
    "sft": ("policy", train("sft")),
    "rank": ("policy", train("rank")),
    "reward": ("policy", train("reward")),
    "reward, from a reward model": ("reward", train("reward")),
    "ppo": ("policy", online("ppo", "--model_name_or_path")),
    "ppo, scorer": ("reward", online("ppo", "--reward_model_name_or_path")),
    "ppo, critic": ("reward", online("ppo", "--reward_critic_model_name_or_path")),
    "iterative": ("policy", online("iterative", "--model_name_or_path")),
    "iterative, scorer": ("reward", online("iterative", "--reward_model_name_or_path")),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_it_and_accepts_it_when_told(
    command: str,
    world: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One flipped bit: exit 2 and nothing made; with the flag it is done, with a warning."""
    run, words = COMMANDS[command]
    folder = copied(world, run, tmp_path)
    given = words(folder, world, tmp_path)
    flipped("model.safetensors", 0.9999)(folder)
    for _ in range(2):
        assert do(*given) == 2
        told = capfd.readouterr().err
        assert "model.safetensors has other bytes than were written. If it was changed" in told
        assert "Traceback" not in told and "--accept_edited_files" in told
        made = [path for path in tmp_path.rglob("*.safetensors") if folder not in path.parents]
        assert not made and not list(tmp_path.rglob("*.jsonl"))
    assert do(*given, "--accept_edited_files") == 0
    warned = "has other bytes than were written; read as it is (--accept_edited_files)"
    assert caplog.text.count(warned) >= 1


def test_removing_the_manifest_accepts_it_for_good(world: Path, tmp_path: Path) -> None:
    folder = copied(world, "policy", tmp_path)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "top_k": 5}))
    with pytest.raises(UserError, match=r"generation_config\.json has"):
        load_causal_lm(folder)
    (folder / "manifest.json").unlink()
    assert load_causal_lm(folder).generation_config.top_k == 5


def test_acceptance_ends_with_the_call(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(world, "policy", tmp_path)
    DAMAGES["a template added"](folder)
    given = generate(folder, world, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert do(*given, "--accept_edited_files") == 0
    (tmp_path / "x.jsonl").unlink()
    (tmp_path / "x.manifest.json").unlink()
    assert do(*given) == 2


# What a run keeps beside its main model.


@pytest.fixture(scope="module")
def online_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("online")
    world = build_world(folder)
    changes = {"eval_datasets": str(world / "prompts.jsonl"), "eval_steps": 2, "use_ema": True}
    ppo.train(settings(world, folder / "run", max_steps=2, num_rollouts=-1, **changes))
    yield folder / "run"


MODELS = ["policy", "value", "policy_ema", "best/policy", "best/value"]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_of_a_run_is_sealed(name: str, online_run: Path, tmp_path: Path) -> None:
    source = online_run / name
    assert damage_of(source) is None
    sealed = json.loads((source / "manifest.json").read_text())["files"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= sealed.keys()
    copy = shutil.copytree(source, tmp_path / "copy")
    flipped("model.safetensors", 0.9)(copy)
    with pytest.raises(UserError, match=r"model\.safetensors has other bytes"):
        require_as_written(copy)


def test_best_vouches_for_the_models_inside(online_run: Path, tmp_path: Path) -> None:
    best = shutil.copytree(online_run / "best", tmp_path / "best")
    assert damage_of(best) is None
    assert load_causal_lm(best).num_parameters() > 0  # its main model
    flipped("model.safetensors")(best / "value")
    assert damage_of(best) == "value: model.safetensors has other bytes than were written"


def test_a_damaged_best_does_not_become_the_outcome(online_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(online_run, tmp_path / "run")
    flipped("model.safetensors")(run / "best" / "policy")
    before = (run / "policy" / "model.safetensors").read_bytes()
    best = object.__new__(BestModel)
    best.folder, best.step = run / "best", 2
    best._parallel = Parallel()
    best._models = type("Models", (), {"measured": ["policy", "value"]})()
    with pytest.raises(UserError, match=r"best/policy: is not as its manifest\.json"):
        best.copy_to(run)
    assert (run / "policy" / "model.safetensors").read_bytes() == before
    assert not list(run.glob(".staged-*"))
