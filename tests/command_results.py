"""What a command of docs/coming_from.md must have made: each is looked at after it ran."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from coming_from_cases import CONFIGS, FLAGS

from rrhf.cli.flags import parse_config, read_words
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.results import load_row
from rrhf.manifests import read_manifest
from rrhf.report.config import CompareConfig

NUM_PROMPTS = 3
"""For which the commands are run."""


def look_at(command: str, arguments: list[str]) -> None:
    if command == "response-gen":
        look_at_response_gen(arguments)
        return
    config: Any = parse_config(CONFIGS[command], arguments, command)
    if command == "train iterative":
        look_at_rounds(config)
    elif command.startswith("train "):
        look_at_training(command, config)
    elif command == "generate":
        look_at_candidates(Path(config.output_file), scored=False)
    elif command == "score":
        look_at_candidates(Path(config.output_file), scored=True)
    elif command == "evaluate":
        look_at_evaluation(config)
    elif command == "compare":
        look_at_table(config)
    else:
        assert command == "data convert", f"{command}: say here what it makes"
        names = list(config.parts or ())
        files = [Path(config.output, f"{name}.jsonl") for name in names] or [Path(config.output)]
        rows = [s for file in files for s in read_candidate_sets(file)]
        assert rows and len({s.id for s in rows}) == len(rows)
        assert all(any(True for _ in read_candidate_sets(file)) for file in files)


def look_at_training(command: str, config: Any) -> None:
    """The run ended and did as it was told; its metrics are numbers, its model has moved."""
    run = Path(config.output_dir)
    manifest = read_manifest(run)
    assert manifest is not None and manifest["status"] == "complete"
    assert manifest["steps"] == config.max_steps
    settings = json.loads((run / "settings.json").read_text())
    assert settings == json.loads(json.dumps(config.as_dict()))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert all(math.isfinite(value) for row in metrics for value in row.values())
    assert any("loss" in row for row in metrics)
    model = run / ("reward_model" if command == "train reward" else "policy")
    shape = json.loads((model / "config.json").read_text())
    if command == "train reward":
        assert shape["architectures"] == ["LlamaForSequenceClassification"]
        assert len(shape["id2label"]) == 1
        assert shape["rrhf_score_normalizer"]["type"] == config.normalizer_type
        (held_out,) = [row for row in metrics if "eval_accuracy" in row]
        assert 0 <= held_out["eval_accuracy_low"] <= held_out["eval_accuracy_high"] <= 1
        assert held_out["eval_score_std"] >= 0 and "eval_score_mean" in held_out
    else:
        assert shape["architectures"] == ["LlamaForCausalLM"]
    if command == "train ppo":
        look_at_ppo(run, config, metrics)
    assert moved(model, Path(config.model_name_or_path)) == (config.learning_rate > 0)


def look_at_ppo(run: Path, config: Any, metrics: list[dict[str, float]]) -> None:
    """What the page says that its users find there."""
    (rollout, *_) = [row for row in metrics if "score" in row]
    assert {"reward", "kl", "kl_k3", "response_length", "response_length_max"} <= rollout.keys()
    (step, *_) = [row for row in metrics if "loss" in row]
    if config.method == "rrhf":
        assert {"rank_loss", "sft_loss"} <= step.keys()
    else:
        assert {"policy_loss", "value_loss", "value", "return", "ratio"} <= step.keys()
        assert ("ptx_loss" in step) == (config.ptx_datasets is not None)
    assert any("eval_score" in row for row in metrics) == (config.eval_datasets is not None)
    assert (run / "value").is_dir() == config.has_critic


def look_at_rounds(config: Any) -> None:
    """Every round went through its stages, and moved the policy of the round before."""
    run = Path(config.output_dir)
    manifest = read_manifest(run)
    assert manifest is not None and manifest["status"] == "complete"
    assert len(manifest["rounds"]) == config.num_rounds == 2
    before = Path(config.model_name_or_path)
    for number in (1, 2):
        look_at_candidates(run / f"round-{number}" / "train_data.json", scored=True)
        policy = run / f"round-{number}" / "rank" / "policy"
        assert moved(policy, before)
        before = policy
    assert not moved(run / "policy", before)


def moved(model: Path, start: Path) -> bool:
    """Whether any weight that both models have differs."""
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (start, model))
    shared = before.keys() & after.keys()
    assert shared
    return any(not before[name].equal(after[name]) for name in shared)


def look_at_candidates(path: Path, scored: bool) -> None:
    manifest = read_manifest(path)
    assert manifest is not None and manifest["status"] == "complete"
    rows = [json.loads(line) for line in path.open()]
    assert rows
    for row in rows:
        published = ["query", "responses", "scores"][: 3 if scored else 2]
        assert list(row)[: len(published)] == published
        assert row["query"] and row["responses"]
    for found in read_candidate_sets(path):
        assert all((c.score is not None) == scored for c in found.candidates)


def look_at_response_gen(arguments: list[str]) -> None:
    values, _ = read_words(FLAGS["response-gen"], arguments, "response-gen")
    folder = Path(values["output_dir"])
    look_at_candidates(folder / "generated.jsonl", scored=False)
    look_at_candidates(folder / "train_data.json", scored=True)
    rows = [json.loads(line) for line in (folder / "train_data.json").open()]
    assert len(rows) == NUM_PROMPTS
    for row in rows:
        sampled = [source for source in row["sources"] if source.startswith("policy:")]
        assert len(sampled) == 4
        assert row["sources"][4:] in ([], ["human:chosen", "human:rejected"])
    sampling = json.loads((folder / "generated.manifest.json").read_text())["settings"]["sampling"]
    if "do_sample" not in values:
        assert (sampling["num_beam_groups"], sampling["diversity_penalty"]) == (4, 1.0)


def look_at_evaluation(config: EvaluateConfig) -> None:
    names = {"greedy": 1, "sample": 1, "both": 2}[config.decoding] if not config.responses else 1
    newest = sorted(Path(config.output_dir).glob("*.samples.jsonl"), key=os.path.getmtime)[-names:]
    for samples in newest:
        row = load_row(samples.with_name(samples.name.replace(".samples.jsonl", ".json")))
        assert math.isfinite(row["metrics"]["reward"]["mean"])
        assert row["made_with"]["num_prompts"] == NUM_PROMPTS
        if config.ppl_model_name_or_path:
            assert row["metrics"]["ppl_paper"]["mean"] < row["metrics"]["ppl_paper_e"]["mean"]
        if config.model_name_or_path:
            assert {"ppl_human", "pi_accuracy"} <= row["metrics"].keys()
        look_at_candidates(samples, scored=True)


def look_at_table(config: CompareConfig) -> None:
    header, rule, *lines = Path(config.output).read_text().splitlines()
    assert header.startswith("|") and set(rule) <= set("|-: ") and "reward" in header
    assert "p_i accuracy" in header
    (folder,) = config.rows
    files = [p for p in Path(folder).glob("*.json") if not p.name.endswith(".manifest.json")]
    names = {load_row(path)["name"] for path in files}
    assert len(names) > 1
    body = lines[: lines.index("")]
    assert {line.split("|")[1].strip() for line in body} == names
    assert all(line.count("|") == header.count("|") for line in body)
