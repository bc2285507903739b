"""Configurations from words and files: what is accepted, what is refused, with which message."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import pytest

from rrhf.cli.fields import field_docs, flags_of, nearest
from rrhf.cli.flags import parse_config, read_values
from rrhf.cli.help_page import help_page, preset_names
from rrhf.errors import UserError


@dataclass
class Shared:
    """Settings of every toy.

    A second paragraph that the help leaves out.
    """

    model: str = field(metadata={"positional": True, "aliases": ["model_name"]})
    """The policy folder."""

    learning_rate: float = 1e-5
    """Peak of
    the schedule."""

    bf16: bool = False
    """Mixed precision."""


@dataclass
class Toy(Shared):
    """Train a toy."""

    data: str = field(default="", metadata={"positional": True, "aliases": ["train-data"]})
    """Where the data lies."""

    mode: Literal["paper", "released"] = "paper"
    """Which loss."""

    steps: int = -1
    """How many."""

    limit: int | None = None
    """At most this many."""

    modules: list[str] = field(default_factory=lambda: ["q", "v"])
    """Layers."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Two numbers."""

    stops: tuple[str, ...] = ()
    """Strings."""

    budget: int | float | str = 1
    """Number or text."""

    options: dict[str, int] = field(default_factory=dict)
    """A mapping."""

    where: Path = Path("here")
    """A path."""

    num_groups: Literal[1, 2, 4] = 1
    """Groups."""

    learning_rate: float = 2e-5
    """Peak, as a toy wants it."""

    def __post_init__(self) -> None:
        if self.steps == 0:
            raise ValueError("steps: 0 makes no sense; give -1 or more than 0")


@dataclass
class WithoutPositionals:
    num_epochs: int = 1
    """How many."""


def parse(*words: str) -> Toy:
    return parse_config(Toy, words, "rrhf toy")


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*words)
    return str(caught.value)


def test_each_type_is_read_from_words():
    toy = parse(
        *["m", "--learning_rate", "3e-4", "--bf16", "--mode", "released", "--steps", "-1"],
        *["--limit", "7", "--modules", "a", "b", "--betas", "0.1", "0.2", "--stops", "x;y", "z"],
        *["--budget", "2.5", "--options", "{a: 1}", "--where", "/a b", "--num_groups", "4"],
    )
    expected = Toy("m", 3e-4, True, "", "released", -1, 7, ["a", "b"], (0.1, 0.2), ("x;y", "z"))
    expected.budget, expected.options, expected.where = 2.5, {"a": 1}, Path("/a b")
    expected.num_groups = 4
    assert toy == expected
    assert isinstance(toy.num_groups, int)


def test_defaults_stand_where_nothing_is_given():
    assert parse("m") == Toy("m")


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16", "True"], True),
        (["--bf16", "false"], False),
        (["--bf16=False"], False),
        (["--bf16", "--steps", "3"], True),
        (["--bf16", "1"], True),
        (["--bf16=0"], False),
    ],
)
def test_booleans(words: list[str], value: bool):
    assert parse("m", *words).bf16 is value


@pytest.mark.parametrize(("written", "value"), [("1", True), ("0", False), ("true", True)])
def test_booleans_of_a_file(written: str, value: bool, tmp_path: Path):
    (tmp_path / "toy.json").write_text(f'{{"bf16": {written}}}')
    assert parse("m", "--config", str(tmp_path / "toy.json")).bf16 is value
    (tmp_path / "toy.json").write_text('{"bf16": 2}')
    with pytest.raises(UserError, match="true or false"):
        parse("m", "--config", str(tmp_path / "toy.json"))


def test_a_bare_boolean_leaves_the_next_word_to_the_positionals():
    toy = parse("m", "--bf16", "data.json")
    assert (toy.bf16, toy.data) == (True, "data.json")


def test_none_is_a_word_only_where_none_is_a_value():
    assert parse("m", "--limit", "none").limit is None
    assert parse("m", "--data", "none").data == "none"


def test_dashes_underscores_aliases_and_equals_signs_are_the_same():
    for spelling in ("--learning-rate=0.5", "--learning_rate=0.5"):
        assert parse("m", spelling).learning_rate == 0.5
    for spelling in ("--train_data", "--train-data", "--data"):
        assert parse("m", spelling, "d").data == "d"
    assert parse("--model_name", "m").model == "m"


def test_a_positional_may_be_given_by_name_and_the_next_word_fills_the_next_one():
    assert parse("--model", "m", "d") == parse("m", "d")


def test_a_positional_list_takes_the_words_up_to_the_next_flag():
    @dataclass
    class Many:
        first: str = field(metadata={"positional": True})
        """One."""
        files: list[str] = field(metadata={"positional": True})
        """Any number."""
        quiet: bool = False
        """Say less."""

    assert parse_config(Many, ["a", "b;c", "d", "--quiet"], "x") == Many("a", ["b;c", "d"], True)


@pytest.mark.parametrize(
    ("words", "second"),
    [
        (["m", "--steps", "1", "--steps", "2"], "--steps"),
        (["m", "--steps", "1", "--steps=1"], "--steps"),
        (["m", "--data", "a", "--train_data", "b"], "--train_data"),
        (["m", "--model_name", "n"], "--model_name"),
        (["d", "--model=m", "d"], "--model"),
        (["m", "--bf16", "--bf16", "false"], "--bf16"),
    ],
)
def test_a_flag_that_is_given_twice_is_refused(words: list[str], second: str):
    assert f"is given twice, the second time by {second}." in refusal(*words)


def test_a_value_may_begin_with_dashes_after_an_equals_sign():
    assert parse("m", "--data=--odd").data == "--odd"
    assert "--data=--odd" in refusal("m", "--data", "--odd")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["m", "--learning_rat", "1"], ["--learning_rat;", "did you mean --learning_rate?"]),
        (["m", "--learn", "1"], ["unknown flag --learn;", "--learning_rate?"]),
        (["m", "--confg", "x"], ["did you mean --config?"]),
        (["m", "--zzz"], ["unknown flag --zzz."]),
        (["m", "--steps", "3.5"], ["--steps", "'3.5'", "a whole number"]),
        (["m", "--steps", "1e3"], ["--steps", "'1e3'", "a whole number"]),
        (["m", "--learning_rate", "nan"], ["--learning_rate", "'nan'", "a number"]),
        (["m", "--mode", "papr"], ["--mode", "'papr'", "one of paper, released"]),
        (["m", "--betas", "0.1"], ["--betas", "'0.1'", "2 values, each a number"]),
        (["m", "--bf16=yes"], ["--bf16", "'yes'", "true or false"]),
        (["m", "--limit", "many"], ["--limit", "'many'", "none or a whole number"]),
        (["m", "--steps"], ["--steps needs a value: a whole number"]),
        (["m", "d", "more"], ["unexpected argument 'more'"]),
        ([], ["needs also", "--model: The policy folder."]),
        (["m", "--steps", "0"], ["rrhf toy: steps: 0 makes no sense"]),
    ],
)
def test_a_mistake_is_named_with_its_mend(words: list[str], parts: list[str]):
    message = refusal(*words)
    for part in parts:
        assert part in message


def test_a_file_gives_values_that_flags_override(tmp_path: Path):
    config = tmp_path / "a b.yaml"
    config.write_text(
        "model: m\nlearning_rate: 2e-3\nbf16: true\nlimit: null\nsteps: 4\nstops: [a]\n"
    )
    toy = parse("--config", str(config), "--steps", "5")
    assert toy == Toy("m", 2e-3, True, steps=5, stops=("a",))
    assert toy.learning_rate == 0.002  # YAML reads 2e-3 as text


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("~/a", "/home/me/a"),
        ("~", "/home/me"),
        ("x:1:~/a, ~/b,~/c", "x:1:/home/me/a, /home/me/b,/home/me/c"),
        ("a~/b", "a~/b"),
        ("x:~y", "x:~y"),
        ("what is ~/a?", "what is ~/a?"),
    ],
)
def test_a_tilde_is_the_home_folder_where_a_path_may_stand(
    written: str, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    @dataclass
    class Named:
        data: str = field(default="", metadata={"names": "data"})
        """A path."""
        several: list[str] = field(default_factory=list, metadata={"names": "data"})
        """Paths."""
        text: str = ""
        """No path."""

    monkeypatch.setenv("HOME", "/home/me")
    words = [f"--data={written}", "--several", written, "b", f"--text={written}"]
    assert parse_config(Named, words, "x") == Named(read, [read, "b"], written)
    (tmp_path / "c.json").write_text(json.dumps({"data": written, "several": [written]}))
    parsed = parse_config(Named, ["--config", str(tmp_path / "c.json")], "x")
    assert parsed == Named(read, [read])


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Explain this, ~/.bashrc please", "Explain this, ~/.bashrc please"),
        ("What is in here: ~/a?", "What is in here: ~/a?"),
        ("text:~/a", "text:~/a"),
        ("~/a.jsonl,alpaca:1:~/b c.jsonl", "/home/me/a.jsonl,alpaca:1:/home/me/b c.jsonl"),
        ("~/my prompts.jsonl", "/home/me/my prompts.jsonl"),
    ],
)
def test_a_tilde_in_a_prompt_is_a_tilde(
    written: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass
    class Asked:
        prompts: str = field(default="", metadata={"names": "prompts"})
        """Prompts, or a prompt itself."""

    monkeypatch.setenv("HOME", "/home/me")
    assert parse_config(Asked, ["--prompts", written], "x") == Asked(read)


def test_later_files_override_earlier_ones(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("steps: 1\nmode: released\n")
    (tmp_path / "b.json").write_text('{"steps": 2, "train-data": "d"}')
    toy = parse("m", f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.json"))
    assert (toy.steps, toy.mode, toy.data) == (2, "released", "d")


def test_a_bare_file_is_a_config_where_no_bare_word_is_expected(tmp_path: Path):
    file = tmp_path / "b.json"
    file.write_text('{"num_epochs": 2}')
    config = parse_config(WithoutPositionals, [str(file)], "rrhf toy")
    assert config.num_epochs == 2
    with pytest.raises(UserError, match="unexpected argument"):
        parse_config(WithoutPositionals, ["word"], "rrhf toy")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model: m\nlerning_rate: 1\n", ["unknown key lerning_rate; did you mean learning_rate?"]),
        ("steps: true\n", ["steps", "True", "a whole number"]),
        ("steps: 1.5\n", ["steps", "1.5", "a whole number"]),
        ("bf16: 'true'\n", ["bf16", "'true'", "true or false"]),
        ("mode: no\n", ["mode", "False", "one of paper, released"]),
        ("data: 3\n", ["data", "3", "text"]),
        ("learning_rate: .nan\n", ["learning_rate", "nan", "a number"]),
        ("data: a\ntrain_data: b\n", ["data is given twice, the second time by train_data"]),
        ("- steps\n", ["expected `name: value` lines, found a list"]),
        ("a: [\n", ["cannot be parsed"]),
        ("!!python/object/apply:os.getcwd []\n", ["cannot be parsed"]),
    ],
)
def test_a_mistake_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, parts: list[str]):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    message = refusal("m", "--config", str(config))
    for part in [str(config), *parts]:
        assert part in message


def test_an_empty_file_gives_nothing(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert parse("m", "--config", str(tmp_path / "c.yaml")) == Toy("m")


def test_an_unknown_preset_names_the_nearest():
    assert "did you mean rrhf-7b-fsdp2?" in refusal("m", "--config", "rrhf-7b-fsdp")
    assert "no such file" in refusal("m", "--config", "gone.yaml")


def test_help_shows_each_flag_with_its_text_and_default(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    page = capsys.readouterr().out
    for item in fields(Toy):
        assert f"--{item.name} " in page
    assert "usage: rrhf toy MODEL [DATA] [--flag value ...]" in page
    assert page.index("--data ") < page.index("Settings of every toy:") < page.index("--bf16 ")
    assert "Train a toy." in page
    assert "Settings of every toy:" in page and "second paragraph" not in page
    assert "Peak, as a toy wants it. [default: 2e-05]" in page
    needed, _, others = page.partition("must be given:\n")[2].partition("\n\n")
    assert "The policy folder." in needed and "The policy folder." not in others
    assert "--mode {paper,released}" in page
    assert "Layers. [default: q v]" in page
    assert "(also --train_data)" in page


def test_docs_are_those_under_the_fields():
    assert field_docs(Shared)["learning_rate"] == "Peak of the schedule."
    assert field_docs(Toy)["learning_rate"] == "Peak, as a toy wants it."
    assert set(field_docs(Toy)) == {item.name for item in fields(Toy)}


def test_nearest_is_silent_where_nothing_is_near():
    assert nearest("qqqq", ["learning_rate", "bf16"]) is None


CONFIGS = [
    ("rrhf.training.methods.sft", "SFTConfig"),
    ("rrhf.training.methods.reward", "RewardConfig"),
    ("rrhf.training.methods.rank", "RankConfig"),
    ("rrhf.training.rounds.iterative", "IterativeConfig"),
    ("rrhf.training.online.ppo", "PPOConfig"),
    ("rrhf.generation.stage", "GenerateConfig"),
    ("rrhf.scoring.stage", "ScoreConfig"),
    ("rrhf.evaluation.evaluate", "EvaluateConfig"),
    ("rrhf.report.compare", "CompareConfig"),
    ("rrhf.studies.demo", "DemoConfig"),
    ("rrhf.models.fetch", "FetchConfig"),
]


@pytest.mark.parametrize(("module", "name"), CONFIGS)
def test_every_field_of_every_configuration_is_documented(module: str, name: str):
    config_class = getattr(importlib.import_module(module), name)
    undocumented = [flag.name for flag in flags_of(config_class).values() if not flag.help]
    assert undocumented == []
    assert help_page("rrhf x", config_class, flags_of(config_class))


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_fits_the_rank_trainer(preset: str):
    rank = importlib.import_module("rrhf.training.methods.rank")
    given = ["--model_name_or_path", "m", "--output_dir", "o", "--data_path", "d"]
    config = parse_config(rank.RankConfig, [*given, "--config", preset], "rrhf train rank")
    assert config.learning_rate > 0


def test_the_tiny_preset_fits_every_trainer():
    for stage in ("sft", "reward", "rank"):
        module_name, config, _ = importlib.import_module("rrhf.cli.train").STAGES[stage]
        flags = flags_of(getattr(importlib.import_module(module_name), config))
        assert read_values(flags, ["--config", "tiny"], "rrhf train")
