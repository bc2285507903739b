"""Words that people type: short names, names of methods, and what serves where there is nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_cases import FLAGS, PPO

from rrhf.cli import words
from rrhf.cli.fields import edits, flags_of, near, nearest, spellings
from rrhf.cli.flags import parse_config, read_words
from rrhf.cli.main import COMMANDS as ALL_COMMANDS
from rrhf.cli.main import main
from rrhf.cli.train import STAGES
from rrhf.errors import UserError
from rrhf.report.config import CompareConfig
from rrhf.training.methods.rank_config import RankConfig
from rrhf.training.online.ppo_config import PPOConfig

# Short names


@pytest.mark.parametrize(
    ("command", "word", "field"),
    [
        ("train sft", "lr", "learning_rate"),
        ("train sft", "model", "model_name_or_path"),
        ("train sft", "batch_size", "per_device_train_batch_size"),
        ("train rank", "epochs", "num_train_epochs"),
        ("train rank", "data", "data_path"),
        ("train reward", "dataset", "data_path"),
        ("train reward", "use-peft", "use_lora"),
        ("train ppo", "critic_lr", "critic_learning_rate"),
        ("train ppo", "num_generations", "num_return_sequences"),
        ("train ppo", "reward_model", "reward_model_name_or_path"),
        ("train ppo", "data", "train_datasets"),
        ("train iterative", "max_completion_length", "max_new_tokens"),
        ("generate", "batch_size", "per_device_prompt_batch_size"),
        ("generate", "output", "output_file"),
        ("score", "reward_model_path", "scorer"),
        ("evaluate", "batch_size", "per_device_eval_batch_size"),
        ("evaluate", "ref_model", "reference_model_name_or_path"),
        ("response-gen", "model", "model_name_or_path"),
    ],
)
def test_a_short_name_means_one_flag(command: str, word: str, field: str):
    flags = FLAGS[command]
    value = "2" if field not in ("use_lora",) else "true"
    values, _ = read_words(flags, [f"--{word}", value], command)
    assert list(values) == [field]


@pytest.mark.parametrize(
    ("command", "word", "fields"),
    [
        ("train ppo", "batch_size", ["per_device_train_batch_size", "rollout_size"]),
        (
            "train iterative",
            "batch_size",
            ["per_device_train_batch_size", "per_device_prompt_batch_size"],
        ),
        ("response-gen", "n_samples_per_prompt", []),
    ],
)
def test_a_word_that_may_mean_several_flags_is_not_guessed(
    command: str, word: str, fields: list[str]
):
    flags = FLAGS[command]
    if not fields:
        assert read_words(flags, [f"--{word}=2"], command)[0] == {"num_return_sequences": 2}
        return
    with pytest.raises(UserError, match=f"flag --{word} may mean") as caught:
        read_words(flags, [f"--{word}", "2"], command)
    for field in fields:
        assert f"\n  --{field}: " in str(caught.value)


def test_the_table_of_short_names_is_sound():
    known = {name for flags in FLAGS.values() for name in spellings(flags)}
    for word, fields in words.SHORT_NAMES.items():
        assert fields and set(fields) <= known | {"output"}, word
    for command, flags in FLAGS.items():
        found = words.spelt_out(flags)
        for word in words.SHORT_NAMES:
            meant = words.meanings(word, flags)
            if word in spellings(flags):
                assert found[word] is spellings(flags)[word], (command, word)
            elif len(meant) == 1:
                assert found[word] is meant[0]
            else:
                assert word not in found, (command, word)


def test_a_flag_of_that_name_goes_before_the_table():
    flags = flags_of(CompareConfig)
    assert words.spelt_out(flags)["output"].name == "output"


def test_a_short_name_and_the_long_one_are_given_twice(tmp_path: Path):
    with pytest.raises(UserError, match="learning_rate is given twice, the second time by --lr"):
        parse_config(PPOConfig, [*PPO, "--learning_rate=1", "--lr=2"], "rrhf train ppo")
    (tmp_path / "c.json").write_text('{"lr": 0.5, "model": "n"}')
    config = parse_config(PPOConfig, [*PPO, f"--config={tmp_path / 'c.json'}"], "rrhf train ppo")
    assert (config.learning_rate, config.model_name_or_path) == (0.5, "m")


# Nearest names


def slips(name: str) -> list[str]:
    """A letter that is missing, doubled, wrong, or swapped with the next one."""
    found = []
    for place in range(1, len(name), 3):
        before, letter, after = name[:place], name[place], name[place + 1 :]
        found += [before + after, before + 2 * letter + after, f"{before}x{after}"]
        found.append(before + after[:1] + letter + after[1:])
    return [slip for slip in found if slip != name]


def test_slips_of_the_fingers_find_their_name():
    known = list(spellings(FLAGS["train ppo"]))
    for name in known[::6]:
        for slip in slips(name):
            if slip not in known and min(len(slip), len(name)) >= 4:
                assert name in near(slip, known), (slip, near(slip, known))


GUESSED_BEFORE = """
    use_vllm fp16 do_train push_to_hub beta optim device precision shuffle_dataset dtype name
    eval_mode num_workers generation_batch_size scale_rewards adam_offload project_name
    completion_only_loss log_completions world_size logging_strategy save_strategy run_name
    num_iterations steps_per_generation epsilon delta verbose debug pad bos
"""


MEANT = ("evaluate-reward", "name")
"""--names is what is meant: it names the scorers."""


def test_words_of_other_programs_get_no_misleading_name():
    """A hint that is wrong costs more than none: it reads as if the thing were there."""
    for command, flags in FLAGS.items():
        for word in GUESSED_BEFORE.split():
            if word not in spellings(flags) and (command, word) != MEANT:
                assert near(word, spellings(flags)) == [], (command, word)
    assert near("dpo", STAGES) == near("kto", STAGES) == near("chat", ALL_COMMANDS) == []
    assert near("plan", ALL_COMMANDS) == near("server", ALL_COMMANDS) == []


@pytest.mark.parametrize(
    ("name", "known", "found"),
    [
        ("ppoo", ["ppo", "sft"], ["ppo"]),
        ("dpo", ["ppo"], []),
        ("rnak", ["rank", "reward"], ["rank"]),
        ("learn", ["learning_rate", "lora_r"], ["learning_rate"]),
        ("max_tokens", ["max_new_tokens", "min_new_tokens"], ["max_new_tokens"]),
        ("adam_beta", ["adam_beta1", "adam_beta2"], ["adam_beta1", "adam_beta2"]),
        ("kl", ["kl_a", "kl_b"], []),
        ("kl_", ["kl_a", "kl_b", "kl_c", "kl_d"], []),
        ("", ["a", "b"], []),
        ("x", [], []),
    ],
)
def test_near(name: str, known: list[str], found: list[str]):
    assert near(name, known) == found
    assert nearest(name, known) == (found[0] if found else None)


def plain_edits(left: str, right: str) -> int:
    """The same distance by its recursive definition."""
    if not left or not right:
        return len(left) + len(right)
    changed = left[-1] != right[-1]
    found = [
        plain_edits(left[:-1], right) + 1,
        plain_edits(left, right[:-1]) + 1,
        plain_edits(left[:-1], right[:-1]) + changed,
    ]
    if len(left) > 1 and len(right) > 1 and left[-2:] == right[-1] + right[-2]:
        found.append(plain_edits(left[:-2], right[:-2]) + 1)
    return min(found)


@pytest.mark.parametrize(
    ("left", "right"),
    [("", ""), ("", "ab"), ("rnak", "rank"), ("ca", "abc"), ("trian", "train"), ("abba", "baab")],
)
def test_edits_are_those_of_the_definition(left: str, right: str):
    assert edits(left, right) == edits(right, left) == plain_edits(left, right)


def test_rank_is_still_rank():
    assert parse_config(RankConfig, ["--lr=1", "--model=m", "--out_dir=o", "--data=d"], "x") == (
        RankConfig("m", "o", learning_rate=1.0, data_path="d")
    )


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("train rank", "engine"),
        ("train ppo", "engine"),
        ("score", "engine"),
        ("response-gen", "score_engine"),
        ("generate", "engine"),
        ("evaluate", "engine"),
        ("response-gen", "engine"),
    ],
)
def test_the_old_name_of_a_layout_has_one_message(command: str, flag: str, tmp_path: Path, capsys):
    """`--engine padded` of version 0.1.0."""
    words = {"generate": "--model_name_or_path m --prompts p --output_file o.jsonl"}
    words["evaluate"] = "--prompts p --output_dir o --model_name_or_path m"
    words["response-gen"] = "m o --scorer function:json:dumps"
    given = [*command.split(), *words.get(command, "").split(), f"--{flag}", "padded"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "--layout" in said and "Traceback" not in said
