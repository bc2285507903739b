"""A run folder stands wherever a model folder is meant, and never passes for a model itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from ppo_cases import save_runs
from trainer_cases import metrics_of, same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrhf.cli.flags import with_home
from rrhf.cli.main import main
from rrhf.errors import UserError
from rrhf.manifests import read_manifest, write_manifest
from rrhf.model_paths import check_model_path, model_folder, require_as_written
from rrhf.models.loading import load_causal_lm
from rrhf.runs import RunFolder, settings_file
from rrhf.scoring.stage import scorer_fingerprint

torch.set_num_threads(1)

TRAINING = ["--model_max_length", 100, "--max_steps", 1, "--learning_rate", 1e-2]


def do(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, data.jsonl, prompts.jsonl and two runs: policy_run/ and reward_run/."""
    runs = {"policy_run": "rank", "reward_run": "reward"}
    return save_runs(tmp_path_factory.mktemp("world"), runs, TRAINING)


def as_earlier_versions_had_it(run: Path) -> None:
    (run / "settings.json").rename(run / "config.json")


# Which folder is meant.


def test_a_run_means_its_main_model(world: Path) -> None:
    assert model_folder(world / "policy_run") == str(world / "policy_run" / "policy")
    assert model_folder(world / "reward_run") == str(world / "reward_run" / "reward_model")
    assert model_folder(f"{world}/reward_run/") == str(world / "reward_run" / "reward_model")
    for name in ("model", "policy_run/policy", "prompts.jsonl", "missing"):
        assert model_folder(world / name) == str(world / name)
    assert model_folder("owner/name") == "owner/name"


def test_home_is_found(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(world))
    assert model_folder("~/policy_run") == str(world / "policy_run" / "policy")
    assert model_folder("~/model") == str(world / "model")
    assert load_causal_lm("~/model").num_parameters() > 0


def test_the_home_folder_of_nobody_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model, output = "--model_name_or_path=~nosuchuser/x", "--output_dir=o"
    for words in (
        ["train", "sft", model, output, "--data_path=d"],
        ["train", "sft", "--model_name_or_path=m", "--output_dir=~nosuchuser/x", "--data_path=d"],
        ["train", "sft", "--config=~nosuchuser/x"],
        ["score", "--input_file=i", "--output_file=o", "--scorer=~nosuchuser/x"],
    ):
        assert main(words) == 2
        told = capsys.readouterr().err
        assert told.count("error: ") == 1 and "Traceback" not in told
        assert "~nosuchuser/x: ~nosuchuser is not a home folder here" in told
    assert not list(tmp_path.iterdir())
    for look in (model_folder, check_model_path, require_as_written, scorer_fingerprint):
        with pytest.raises(UserError, match="~nosuchuser is not a home folder here"):
            look("~nosuchuser/x")
    (tmp_path / "~nosuchuser").mkdir()
    (tmp_path / "~nosuchuser" / "x").touch()  # a name of its own
    assert with_home("~nosuchuser/x") == model_folder("~nosuchuser/x") == "~nosuchuser/x"


def test_runs_of_earlier_versions_are_known(world: Path, tmp_path: Path) -> None:
    """Their settings had the name of a model's config, and the oldest named no model folder."""
    run = tmp_path / "run"
    shutil.copytree(world / "reward_run", run)
    as_earlier_versions_had_it(run)
    assert model_folder(run) == str(run / "reward_model")
    manifest = read_manifest(run)
    assert manifest is not None
    del manifest["model_folder"]
    write_manifest(run, manifest)
    assert model_folder(run) == str(run / "reward_model")


def test_an_unfinished_run_is_refused_with_what_it_kept(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(world / "policy_run" / "settings.json", run)
    write_manifest(run, {"status": "unfinished"})
    with pytest.raises(UserError, match=r"not finished.*--resume_from_checkpoint$"):
        load_causal_lm(run)
    shutil.copytree(world / "model", run / "policies" / "step-000010")
    with pytest.raises(UserError, match=r"not finished.*policies/step-000010$"):
        check_model_path(run)


def test_a_run_whose_model_is_gone_is_refused(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "policy_run", run)
    shutil.rmtree(run / "policy")
    with pytest.raises(UserError, match=r"policy/ is not there any more.*--resume_from_checkpoint"):
        load_causal_lm(run)


def test_a_manifest_leads_to_no_place_outside_the_run(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "policy_run", run)
    write_manifest(run, {"status": "complete", "model_folder": str(world / "model")})
    with pytest.raises(UserError, match="not finished"):
        load_causal_lm(run)


def test_a_model_folder_with_other_files_stays_a_model(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    (tmp_path / "model" / "settings.json").write_text('{"output_dir": "of another program"}')
    (tmp_path / "model" / "manifest.json").write_text("[1, 2]")
    assert model_folder(tmp_path / "model") == str(tmp_path / "model")


# Transformers itself.


def test_a_run_folder_does_not_pass_for_a_model(world: Path) -> None:
    run = world / "policy_run"
    assert not (run / "config.json").exists()
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        with pytest.raises((OSError, ValueError)) as raised:
            auto.from_pretrained(str(run))
        assert "model_type" not in str(raised.value) or "config.json" in str(raised.value)
    AutoModelForCausalLM.from_pretrained(run / "policy")


# Runs of earlier versions go on.


def test_a_run_with_config_json_is_resumed(world: Path, tmp_path: Path) -> None:
    words = ["train", "rank", "--model_name_or_path", world / "model", "--learning_rate", 1e-2]
    words += ["--data_path", world / "data.jsonl", "--model_max_length", 100, "--save_steps", 1]
    do(*words, "--output_dir", tmp_path / "straight", "--max_steps", 2)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "straight", run)
    as_earlier_versions_had_it(run)
    shutil.rmtree(run / "policy")
    shutil.rmtree(run / "checkpoints" / "step-2")
    write_manifest(run, {"status": "unfinished"})
    with pytest.raises(UserError, match="holds an unfinished run"):
        RunFolder(run).open({}, resume=False)
    do(*words, "--output_dir", run, "--max_steps", 2, "--resume_from_checkpoint")
    assert same_weights(tmp_path / "straight" / "policy", run / "policy")
    assert [row["step"] for row in metrics_of(run)] == [1, 2]
    assert settings_file(run) == run / "settings.json"
    assert not (run / "config.json").exists()


def test_a_finished_run_with_config_json_is_left_as_it_is(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "policy_run", run)
    as_earlier_versions_had_it(run)
    settings = json.loads((run / "config.json").read_text())
    assert RunFolder(run).finished_model(settings) == run / "policy"
    with pytest.raises(UserError, match="max_steps was 1 and is 3"):
        RunFolder(run).finished_model({**settings, "max_steps": 3})


def test_the_config_of_a_model_is_never_taken_away(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    run = RunFolder(tmp_path / "model")
    with pytest.raises(UserError, match="--output_dir"):
        run.open({"output_dir": "x"}, resume=False)
    run.open({"output_dir": "x"}, resume=True)
    run.close()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() > 0


# Every command.


def test_every_command_takes_runs_for_models(world: Path, tmp_path: Path) -> None:
    """What comes out with run folders is what comes out with the model folders inside."""
    short = ["--max_new_tokens", 4, "--chat_format", "raw"]
    for out, policy, reward in (
        (tmp_path / "runs", world / "policy_run", world / "reward_run"),
        (tmp_path / "models", world / "policy_run/policy", world / "reward_run/reward_model"),
    ):
        prompts, candidates = world / "prompts.jsonl", out / "candidates.jsonl"
        out.mkdir()
        do(
            *["generate", "--model_name_or_path", policy, "--prompts", prompts],
            *["--output_file", candidates, *short],
        )
        do("score", candidates, out / "scored.jsonl", "--scorer", reward)
        do("response-gen", policy, out / "both", "--prompts", prompts, "--scorer", reward, *short)
        do(
            *[
                "evaluate",
                "--model_name_or_path",
                policy,
                "--scorer",
                reward,
                "--decoding",
                "sample",
            ],
            *["--reference_model_name_or_path", policy, "--baseline", policy, "--prompts", prompts],
            *["--ppl_model_name_or_path", policy, "--output_dir", out / "rows", *short],
        )
        shared = ["--model_name_or_path", policy, *TRAINING]
        data = ["--data_path", out / "scored.jsonl", "--chat_format", "raw"]
        for stage in ("sft", "rank"):
            do("train", stage, *shared, *data, "--output_dir", out / stage)
        scorer = ["--model_name_or_path", reward, *TRAINING]
        do("train", "reward", *scorer, *data, "--output_dir", out / "reward")
        online = [*shared, "--reward_model_name_or_path", reward, "--train_datasets", prompts]
        do(
            *["train", "ppo", *online, *short, "--rollout_size", 4, "--output_dir", out / "ppo"],
            *["--reward_critic_model_name_or_path", reward],
        )
        do("train", "iterative", *online, *short, "--num_rounds", 1, "--output_dir", out / "rounds")
    runs, models = tmp_path / "runs", tmp_path / "models"
    for name in ("candidates.jsonl", "scored.jsonl", "both/train_data.json"):
        assert (runs / name).read_bytes() == (models / name).read_bytes(), name
    for name in ("sft/policy", "rank/policy", "reward/reward_model", "ppo/policy", "ppo/value"):
        assert same_weights(runs / name, models / name), name
    assert same_weights(runs / "rounds" / "policy", models / "rounds" / "policy")
    (row, twin) = (
        json.loads(next((out / "rows").glob("*_run.json")).read_text()) for out in (runs, models)
    )
    for key in ("metrics", "training", "name"):
        assert row[key] == twin[key] is not None, key
    made, made_by_twin = row["made_with"], twin["made_with"]
    for key in ("scorer", "reference", "ppl_model"):
        assert made[key] == made_by_twin[key], key
