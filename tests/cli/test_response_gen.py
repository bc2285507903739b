"""`rrhf response-gen`: which words reach which stage, and what is asked for by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from rrhf.cli import response_gen
from rrhf.cli.fields import flags_of
from rrhf.cli.flags import read_values
from rrhf.cli.help_page import help_page
from rrhf.cli.response_gen import ResponseGenConfig, all_flags, stage_values
from rrhf.errors import UserError
from rrhf.generation import stage
from rrhf.generation.config import GenerateConfig
from rrhf.models import precision
from rrhf.scoring import stage as scoring_stage
from rrhf.scoring.config import ScoreConfig


@dataclass
class Generate:
    """Toy generation."""

    model_name_or_path: str
    """The policy."""
    prompts: str
    """Where prompts come from."""
    output_file: str
    """The file."""
    do_sample: bool = True
    """Draw."""
    num_beams: int = 1
    """Beams."""
    num_beam_groups: int = 1
    """Groups."""
    diversity_penalty: float = 0.0
    """Penalty."""
    bf16: bool = False
    """Weights in bfloat16."""


@dataclass
class Score:
    """Toy scoring."""

    input_file: str
    """The file to read."""
    output_file: str
    """The file to write."""
    scorer: str
    """Who scores."""
    bf16: bool = False
    """Scores in bfloat16."""


def split(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    flags = all_flags(Generate, Score)
    _, generate, score = stage_values(flags, Generate, Score, ["m x", "out;y", *words])
    return generate, score


DIVERSE = {"do_sample": False, "num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0}
GENERATE = {"model_name_or_path": "m x", "output_file": "out;y/generated.jsonl"}
SCORE = {"input_file": "out;y/generated.jsonl", "output_file": "out;y/train_data.json"}


def test_by_default_the_published_search_and_prompts_are_used():
    generate, score = split("--scorer", "r")
    assert generate == {**GENERATE, **DIVERSE, "prompts": "rm-static"}
    assert score == {**SCORE, "scorer": "r"}


def test_the_third_word_chooses_the_beams():
    assert split("true")[0] == {**GENERATE, **DIVERSE, "prompts": "rm-static"}
    assert split("false")[0] == {
        **GENERATE,
        **{"prompts": "rm-static", "do_sample": False, "num_beams": 4},
    }


@pytest.mark.parametrize("words", [["--do_sample", "true"], ["--num_beams=4"]])
def test_another_search_takes_nothing_from_the_published_one(words: list[str]):
    generate, _ = split(*words)
    given = {"do_sample": True} if "--do_sample" in words else {"num_beams": 4}
    assert generate == {**GENERATE, "prompts": "rm-static", **given}


def test_a_shared_name_goes_to_both_stages_and_a_prefix_reaches_one():
    generate, score = split("--bf16", "--score_bf16", "false")
    assert (generate["bf16"], score["bf16"]) == (True, False)
    generate, score = split("--generate-bf16")
    assert generate["bf16"] is True and "bf16" not in score


def test_a_config_file_may_hold_the_values_of_both_stages(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("prompts: p.jsonl\nscorer: r\ngenerate_bf16: true\n")
    generate, score = split("--config", str(file), "--prompts", "q.jsonl")
    assert (generate["prompts"], generate["bf16"]) == ("q.jsonl", True)
    assert score == {**SCORE, "scorer": "r"}


def test_files_between_the_stages_are_not_to_be_named():
    for name in ("--output_file", "--input_file"):
        with pytest.raises(UserError, match="unknown flag"):
            split(name, "x")


def test_the_help_page_shows_the_flags_of_both_but_not_the_files_between():
    flags = all_flags(Generate, Score)
    page = help_page("rrhf response-gen", ResponseGenConfig, flags, every_flag=True)
    usage = (
        "usage: rrhf response-gen MODEL_NAME_OR_PATH OUTPUT_DIR [DIVERSE_BEAM] [--flag value ...]"
    )
    assert page.startswith(usage)
    for part in ("--scorer TEXT", "--num_beams INT", "--score_bf16 ", "[default: rm-static]"):
        assert part in page
    assert "_file " not in page


def test_an_unknown_flag_names_the_nearest_of_either_stage():
    with pytest.raises(UserError, match="--scorer"):
        split("--scorr", "x")
    with pytest.raises(UserError, match="--num_beams"):
        split("--num_beam", "4")


FLAGS = all_flags(GenerateConfig, ScoreConfig)


def another_value(name: str) -> list[str]:
    """The words that give a flag a value that is not its default."""
    for word in ("7", "true", "false", "first_eos", "raw", "trlx", "padded"):
        try:
            [value] = read_values({name: FLAGS[name]}, [f"--{name}", word], "x").values()
        except UserError:
            continue
        if value != FLAGS[name].default:
            return [f"--{name}", word]
    raise AssertionError(f"no word fits {name}")


@pytest.mark.parametrize("name", sorted(FLAGS.keys() - {"diverse_beam", "model_name_or_path"}))
def test_each_flag_that_is_offered_reaches_every_stage_that_has_it(name: str):
    # Any flag of the search takes the place of the published one as a whole.
    search = ["--num_beams" if name == "diversity_penalty" else "--diversity_penalty", "1"]
    own = ["--model_name_or_path", "m", "--output_dir"]
    words = ["7"] if name == "output_dir" else ["o", *another_value(name)]
    before = stage_values(FLAGS, GenerateConfig, ScoreConfig, [*own, "o", *search])[1:]
    after = stage_values(FLAGS, GenerateConfig, ScoreConfig, [*own, *words, *search])[1:]
    reached = {
        (stage, key)
        for stage, old, new in zip(("generate", "score"), before, after, strict=True)
        for key in new
        if old.get(key) != new[key]
    }
    stages = {"generate": GenerateConfig, "score": ScoreConfig}
    prefixed = {
        f"{stage}_{f.name}": (stage, f.name) for stage in stages for f in fields(stages[stage])
    }
    has_it = {(s, name) for s, kind in stages.items() if name in kind.__dataclass_fields__}
    if name == "output_dir":
        has_it = {("generate", "output_file"), ("score", "input_file"), ("score", "output_file")}
    elif name == "columns":  # of the prompts; what was generated has known names
        has_it = {("generate", "columns")}
    assert reached == ({prefixed[name]} if name in prefixed else has_it)


def test_a_shared_name_means_one_thing():
    """Else it would reach a stage for which it means something else."""
    stages = flags_of(GenerateConfig), flags_of(ScoreConfig)
    for name in (stages[0].keys() & stages[1].keys()) - {"columns", "output_file"}:
        assert stages[0][name].hint == stages[1][name].hint, name


def test_an_engine_writes_and_a_layout_scores(tmp_path, capsys):
    words = ["m", "o", "--engine", "local", "--layout", "padded"]
    _, generate, score = stage_values(FLAGS, GenerateConfig, ScoreConfig, words)
    assert generate["engine"] == "local" and "layout" not in generate
    assert score["layout"] == "padded" and "engine" not in score


@pytest.fixture
def sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Runs the command, and returns whether responses were to be sampled in bfloat16."""
    LlamaConfig(hidden_size=256, vocab_size=8).save_pretrained(tmp_path / "wide")
    LlamaConfig(hidden_size=128, vocab_size=8).save_pretrained(tmp_path / "narrow")
    seen: list[Any] = []
    monkeypatch.setattr(stage, "generate_file", lambda config, *place: seen.append(config))
    monkeypatch.setattr(scoring_stage, "score_file", lambda config, *place: seen.append(config))
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(response_gen, "check_places", lambda *args, **named: None)
    monkeypatch.setattr(response_gen, "require_models_as_written", lambda config: None)

    def run(model: str, *words: str) -> bool:
        seen.clear()
        response_gen.main(
            [str(tmp_path / model), str(tmp_path / "out"), "--scorer", "function:m:f", *words]
        )
        generate, score = seen
        assert score.bf16 == (words == ("--bf16", "true")), "in float32 unless asked for"
        return bool(generate.bf16)

    return run


def test_responses_are_sampled_in_the_faster_format(sampled, capsys, monkeypatch):
    assert sampled("wide") and "sampled in bfloat16" in capsys.readouterr().out
    assert not sampled("narrow")
    assert not sampled("nowhere")
    for words in (["--generate_bf16", "false"], ["--bf16", "false"]):
        assert not sampled("wide", *words)
    assert sampled("narrow", "--bf16", "true")
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    assert not sampled("wide")
