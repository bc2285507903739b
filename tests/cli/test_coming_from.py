"""docs/coming_from.md: every command on it is run to what it makes, and every flag it names exists.

The words in capitals stand for tiny models and data that are built here. Beyond what the page says,
commands get only flags that make the work smaller.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from rrhf.cli import data, response_gen
from rrhf.cli.fields import flags_of, normalise, spellings
from rrhf.cli.flags import parse_config, read_words
from rrhf.cli.main import COMMANDS, main
from rrhf.cli.train import STAGES
from rrhf.cli.words import spelt_out
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.data.convert import ConvertConfig
from rrhf.data.mixing import parse_mixture
from rrhf.errors import UserError
from rrhf.evaluation.config import EvaluateConfig
from rrhf.evaluation.results import load_row
from rrhf.generation.config import GenerateConfig
from rrhf.manifests import read_manifest
from rrhf.report.compare import CompareConfig
from rrhf.scoring.stage import ScoreConfig

PAGE = ROOT / "docs" / "coming_from.md"
SECTIONS = ("PaddleNLP's RLHF", "EasyRLHF", "SheepRL's RLHF", "RRHF and Wombat")

PLACEHOLDERS = ["MODEL", "REWARD_MODEL", "TRLX_REWARD_MODEL", "PPL_MODEL", "PAIRS", "MORE_PAIRS"]
PLACEHOLDERS += ["HELD_OUT_PAIRS", "DEMONSTRATIONS", "PROMPTS", "RANKED", "OUT"]
# Longest first, and whole words only: PAIRS is a part of MORE_PAIRS.
PLACEHOLDER = re.compile(rf"\b({'|'.join(sorted(PLACEHOLDERS, key=len, reverse=True))})\b")

STEPS = 2
SAMPLING = {"max_new_tokens": "6", "num_prompts": "3"}
SMALLER: dict[str, dict[str, str]] = {
    "generate": SAMPLING,
    "response-gen": SAMPLING,
    "evaluate": {**SAMPLING, "bootstrap_resamples": "20"},
    "compare": {"bootstrap_resamples": "20"},
    "train iterative": {**SAMPLING, "max_steps": str(STEPS), "num_rounds": "2"},
    "train ppo": {"max_steps": str(STEPS), "max_new_tokens": "6", "rollout_size": "8"},
}
# A script's words are those of the command that it starts.
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train.sh": ("train rank", ("--model_name_or_path", "--output_dir", "--data_path")),
    "ppo.sh": (
        "train ppo",
        ("--model_name_or_path", "--reward_model_name_or_path", "--output_dir", "--train_datasets"),
    ),
    "response_gen.sh": ("response-gen", ("--model_name_or_path", "--output_dir")),
    "scoring_responses.sh": ("score", ("--input_file", "--output_file")),
}
# test_story_scripts starts these; here their commands are run without a process for each.
SCRIPTS_WITH_A_STORY = ("train.sh", "response_gen.sh", "scoring_responses.sh")


def config_classes() -> dict[str, type]:
    """The commands that the page may name, and what each is configured by."""
    stages = {f"train {stage}": _stage_config(stage) for stage in STAGES}
    return {
        **stages,
        "generate": GenerateConfig,
        "score": ScoreConfig,
        "evaluate": EvaluateConfig,
        "compare": CompareConfig,
        "response-gen": response_gen.ResponseGenConfig,
        "data convert": ConvertConfig,
        "data stats": data.StatsConfig,
        "data validate": data.ValidateConfig,
    }


def _stage_config(stage: str) -> type:
    module_name, config_name, _ = STAGES[stage]
    config: type = getattr(importlib.import_module(module_name), config_name)
    return config


CONFIGS = config_classes()
FLAGS = {name: flags_of(config) for name, config in CONFIGS.items()}
FLAGS["response-gen"] = response_gen.all_flags(GenerateConfig, ScoreConfig)


# The page.


def section(title: str) -> str:
    """The text under a heading of the second level."""
    _, _, rest = PAGE.read_text().partition(f"\n## {title}\n")
    assert rest, f"the page has the section {title!r}"
    return rest.partition("\n## ")[0]


def fences(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One command as it stands on the page: its words, or a file that is written by `cat`."""

    words: tuple[str, ...]
    content: str = ""


def steps(shell: str) -> Iterator[Step]:
    """The commands of a fence; backslashes join lines, `cat >FILE <<'WORD'` writes a file."""
    lines = iter(shell.replace("\\\n", " ").splitlines())
    for line in lines:
        if here := re.fullmatch(r"cat >(\S+) <<'(\w+)'", line):
            content = iter(lambda: next(lines), here.group(2))
            yield Step(("cat", here.group(1)), "\n".join(content) + "\n")
        elif line.strip():
            yield Step(tuple(shlex.split(line, comments=True)))


def table_rows(text: str) -> list[list[str]]:
    """The cells of a section's table, heading and rule left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# What the words in capitals stand for.


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny models and data, each kind of data in another form; paths hold a blank."""
    from reward_cases import reward_model_folder
    from tiny import byte_level_tokenizer, save_tiny, tiny_llama

    place = tmp_path_factory.mktemp("coming") / "my things"
    place.mkdir()
    tokenizer = byte_level_tokenizer()
    tiny_llama(len(tokenizer), window=1024).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    save_tiny(place / "ppl_model", seed=1)
    reward_model_folder(place / "reward_model", seed=2)
    _trlx_reward_model(place / "trlx")
    transcripts = [_transcripts(number) for number in range(40)]
    with gzip.open(place / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in transcripts)
    texts = {
        "more_pairs.jsonl": _lines(_numbered_pair(number) for number in range(4)),
        "held_out.jsonl": _lines(_transcripts(number) for number in range(100, 104)),
        "demonstrations.jsonl": _lines(_demonstration(number) for number in range(4)),
        "prompts.json": json.dumps([{"instruction": f"Count to {n}."} for n in range(4)]),
        "ranked.json": json.dumps([_ranked(number) for number in range(4)]),
    }
    for name, text in texts.items():
        (place / name).write_text(text)
    return {
        "MODEL": str(place / "model"),
        "REWARD_MODEL": str(place / "reward_model"),
        "TRLX_REWARD_MODEL": str(place / "trlx"),
        "PPL_MODEL": str(place / "ppl_model"),
        "PAIRS": str(place / "pairs.jsonl.gz"),
        "MORE_PAIRS": str(place / "more_pairs.jsonl"),
        "HELD_OUT_PAIRS": str(place / "held_out.jsonl"),
        "DEMONSTRATIONS": str(place / "demonstrations.jsonl"),
        "PROMPTS": str(place / "prompts.json"),
        "RANKED": str(place / "ranked.json"),
    }


def _lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _transcripts(number: int) -> dict[str, str]:
    start = f"\n\nHuman: What is {number} and a half?\n\nAssistant:"
    return {"chosen": f"{start} A number.", "rejected": f"{start} No idea, sorry."}


def _numbered_pair(number: int) -> dict[str, Any]:
    row = {"prompt": f"Is {number} even?", "response_0": "Who knows.", "response_1": "Divide it."}
    return row | {"better_response_id": 1, "safer_response_id": 0, "is_response_0_safe": True}


def _demonstration(number: int) -> dict[str, str]:
    return {"instruction": "Add one.", "input": str(number), "output": str(number + 1)}


def _ranked(number: int) -> dict[str, Any]:
    responses = ["Red.", "Blue, I think.", "No."]
    row = {"query": f"Name a colour.\nNot {number}.", "responses": responses, "scores": [3, 4.5, 1]}
    return row | {"origin_scores": ["3", "four", None]}


def _trlx_reward_model(folder: Path) -> None:
    """GPT-J's trunk and a value head in one file of weights, as trlX's examples publish them."""
    import torch
    from tiny import byte_level_tokenizer
    from transformers import GPTJConfig, GPTJModel

    tokenizer = byte_level_tokenizer(pad=None, bos=False)
    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=1,
    )
    weights = {f"transformer.{name}": w for name, w in GPTJModel(config).state_dict().items()}
    folder.mkdir()
    torch.save(weights | {"v_head.weight": torch.randn(1, 32)}, folder / "hf_ckpt.pt")
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# Running the page.


def filled(text: str, things: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: things[found.group(1)], text)


def command_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """(command, its arguments) of a line that starts `rrhf` or one of the scripts."""
    if words[0] == "bash":
        command, names = SCRIPTS[Path(words[1]).name]
        given = zip(names, words[2:], strict=False)
        return command, [*(word for pair in given for word in pair), *words[2 + len(names) :]]
    assert words[0] == "rrhf", f"{shlex.join(words)}: the page starts rrhf or bash"
    count = 2 if words[1] in ("train", "data") else 1
    return " ".join(words[1 : 1 + count]), list(words[1 + count :])


def made_smaller(words: Sequence[str]) -> list[str]:
    """The words with flags that bound the work; where the page has them, with smaller values."""
    command, arguments = command_of(words)
    bounds = SMALLER.get(command, {})
    if command.startswith("train ") and "--max_steps" not in arguments:
        bounds = {"max_steps": str(STEPS), **bounds}
    smaller = list(words)
    for name, value in bounds.items():
        if f"--{name}" in smaller:
            smaller[smaller.index(f"--{name}") + 1] = value
        else:
            smaller += [f"--{name}", value]
    return smaller


def run_script(words: Sequence[str]) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_of_a_section_run_and_make_what_they_say(
    title: str, things: dict[str, str], tmp_path: Path
) -> None:
    """One after the other, in one folder, as a reader would; each is looked at before the next."""
    things = things | {"OUT": str(tmp_path / "my work")}
    shells = fences(section(title), "bash")
    assert shells, "the section begins with commands"
    for step in (step for shell in shells for step in steps(shell)):
        words = [filled(word, things) for word in step.words]
        if words[0] == "cat":
            Path(words[1]).write_text(filled(step.content, things))
            continue
        words = made_smaller(words)
        if words[0] == "bash" and Path(words[1]).name not in SCRIPTS_WITH_A_STORY:
            run_script(words)
        else:
            command, arguments = command_of(words)
            assert main([*command.split(), *arguments]) == 0, shlex.join(words)
        look_at(*command_of(words))


def test_no_command_stands_outside_the_sections() -> None:
    text = PAGE.read_text()
    in_sections = [fence for title in SECTIONS for fence in fences(section(title), r"\w*")]
    assert fences(text, r"\w*") == in_sections
    assert text.count("\n## ") == len(SECTIONS)


def test_the_python_on_the_page_registers_a_data_set(
    things: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rrhf.data import sources

    monkeypatch.setattr(sources, "REGISTRY", dict(sources.REGISTRY))
    monkeypatch.setattr(sources, "ALIASES", dict(sources.ALIASES))
    (program,) = [f for title in SECTIONS for f in fences(section(title), "python")]
    exec(filled(program, things | {"OUT": str(tmp_path)}), {})
    sets = list(read_candidate_sets(tmp_path / "mine.jsonl"))
    assert len(sets) == 5  # half of ten, asked for by the alias
    assert {c.source for s in sets for c in s.candidates} == {"human:chosen", "human:rejected"}


# What a command must have made.


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
    assert len(rows) == int(SAMPLING["num_prompts"])
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
        assert row["made_with"]["num_prompts"] == 3
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


# Names of flags.


def takes(command: str, words: Sequence[str]) -> bool:
    """Whether a command knows these flags and their values fit."""
    if command == "data validate":
        words = ["--data", *words]  # its bare words are any number of files
    try:
        read_words(FLAGS[command], words, command)
    except UserError:
        return False
    return True


def somebody_takes(words: Sequence[str]) -> bool:
    if len(words) == 1:
        accepted = (spelt_out(flags) for flags in FLAGS.values())
        return any(normalise(words[0]) in names for names in accepted)
    return any(takes(command, words) for command in FLAGS)


def check_span(span: str) -> bool:
    """Whether a piece of code on the page names flags or commands; if so, they must exist."""
    words = shlex.split(span)
    if words[:2] == ["accelerate", "launch"] and len(words) > 2:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), span
        words = ["rrhf", *words[words.index("rrhf.cli.main") + 1 :]]
    if words[0].endswith(".sh"):
        words = ["bash", *words]
    if words[0] == "bash" and Path(words[1]).name in SCRIPTS:
        return check_script(span, Path(words[1]).name, words[2:])
    if words[0] == "rrhf":
        words = words[1:]
    for command in FLAGS:
        parts = command.split()
        if words[: len(parts)] == parts:
            rest = words[len(parts) :]
            assert takes(command, rest), f"`{span}`: {command} does not take it"
            if command == "data convert" and rest:
                assert parse_mixture(rest[0])
            return True
    if words[0].startswith("configs/"):
        assert (ROOT / words[0]).is_file(), span
    if words[0].startswith("--") and words != ["--help"] and words[0] != "--config":
        assert somebody_takes(words), f"`{span}`: no command takes it"
        return True
    known = {"COMMAND", *COMMANDS}
    assert not span.startswith("rrhf ") or words[0] in known, f"`{span}`: no such command"
    return False


def check_script(span: str, script: str, words: list[str]) -> bool:
    command, names = SCRIPTS[script]
    if "--launch" in words:
        assert script in ("train.sh", "ppo.sh"), span
        assert "configs/launch.sh" in (ROOT / script).read_text(), span
        where = words.index("--launch")
        launch = words[where + 1]
        assert launch == "FILE" or (ROOT / "configs" / f"{launch}.yaml").is_file(), span
        words = words[:where] + words[where + 2 :]
    bare = [] if not words or words[0].startswith("--") else words[: len(names)]
    assert len(bare) in (0, len(names)), f"`{span}`: {script} takes {len(names)} words first"
    assert takes(command, words[len(bare) :]), f"`{span}`: {script} does not take it"
    return True


def test_every_flag_that_the_page_names_exists_and_takes_its_value() -> None:
    rows = [row for title in SECTIONS for row in table_rows(section(title))]
    assert all(len(row) == 3 for row in rows)
    theirs_left_out = " ".join(cell for row in rows for cell in row[1:])
    prose = PAGE.read_text().partition("\n## ")[0]
    checked = [span for span in spans(theirs_left_out + prose) if check_span(span)]
    assert len(checked) > 80


def test_where_the_page_says_that_a_flag_is_the_same_it_is() -> None:
    rows = [row for title in SECTIONS for row in table_rows(section(title))]
    counted = 0
    for known, here, _ in rows:
        words = [word.strip(",") for span in spans(known) for word in span.split()]
        if here.startswith("the same flag and values"):
            name, *values = words
            for value in values:
                assert takes("train reward", [f"--{normalise(name)}", value]), (known, value)
                counted += 1
        elif here.startswith("the same flag"):
            named = re.match(r"the same flags? in `rrhf (train \w+)`", here)
            for word in words:
                flag = f"--{normalise(word)}"
                where = [FLAGS[named.group(1)]] if named else FLAGS.values()
                assert any(normalise(flag) in spellings(flags) for flags in where), (known, word)
                counted += 1
    assert counted > 20


def test_a_flag_that_does_not_exist_would_be_found() -> None:
    with pytest.raises(AssertionError, match="no command takes it"):
        check_span("--loss_typ average")
    with pytest.raises(AssertionError, match="does not take it"):
        check_span("train reward --loss_type averag")
    with pytest.raises(AssertionError, match="does not take it"):
        check_span("train sft --loss_type average")
    with pytest.raises(AssertionError):
        check_span("train.sh --launch zero9")
