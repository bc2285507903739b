"""Help and mistakes are answered before torch or transformers is imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Every case in one interpreter in which heavy packages cannot be imported: whoever tries is named.
RUNNER = """
import contextlib, io, json, sys
HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft", "numpy", "pandas", "pyarrow"}
class Barrier:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Barrier())
from rrhf.cli.main import main
results = []
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
        except AssertionError as error:
            code = str(error)
    results.append([code, out.getvalue(), err.getvalue()])
json.dump(results, sys.stdout)
"""

COMMANDS: dict[str, list[str]] = {
    "demo": [],
    "fetch": ["smollm2", "out"],
    "generate": ["--model_name_or_path=m", "--prompts=p", "--output_file=o"],
    "score": ["i.jsonl", "o.jsonl", "--scorer=r"],
    "response-gen": ["m", "out", "--scorer=r"],
    "train sft": ["--model_name_or_path=m", "--output_dir=o", "--data_path=d"],
    "train reward": ["--model_name_or_path=m", "--output_dir=o", "--data_path=d"],
    "train rank": ["--model_name_or_path=m", "--output_dir=o", "--data_path=d"],
    "train iterative": [
        *("--model_name_or_path=m", "--output_dir=o", "--train_datasets=d"),
        "--reward_model_name_or_path=r",
    ],
    "train ppo": [
        *("--model_name_or_path=m", "--output_dir=o", "--train_datasets=d"),
        "--reward_model_name_or_path=r",
    ],
    "evaluate": ["--output_dir=o", "--prompts=p", "--model_name_or_path=m"],
    "compare": ["rows"],
    "study hh-reward": ["--data_path=d", "--output_dir=o"],
    "study methods": [],
    "data convert": ["d", "o"],
    "data stats": ["d"],
    "data validate": ["d"],
}
"""Each command with what it must be given."""

BAD_VALUES = {
    "demo": "--seeds=many",
    "fetch": "--model=gpt5",
    "generate": "--temperature=0",
    "score": "--max_unscored_fraction=7",
    "response-gen": "--num_return_sequences=0",
    "train sft": "--label_smoothing=2",
    "train reward": "--loss_type=dpo",
    "train rank": "--rrhf_weight=-1",
    "train iterative": "--num_rounds=0",
    "train ppo": "--kl_estimator=k9",
    "evaluate": "--confidence=7",
    "compare": "--width=wide",
    "study hh-reward": "--num_folds=1",
    "study methods": "--methods=dpo",
    "data convert": "--to=nothing",
    "data stats": "--seed=x",
    "data validate": "--split",
}


def answers(cases: list[list[str]]) -> list[tuple[int | str, str, str]]:
    """Exit code (or what was imported), stdout and stderr of each call."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=True,
    )
    return [(code, out, err) for code, out, err in json.loads(done.stdout)]


def test_every_help_page_is_shown_without_a_heavy_import():
    cases = [[*command.split(), "--help"] for command in COMMANDS]
    cases += [["--help"], ["train", "--help"], ["data", "--help"], ["study", "--help"]]
    for words, (code, out, err) in zip(cases, answers(cases), strict=True):
        assert code == 0 and out.startswith("usage: ") and not err, (words, code, err)


@pytest.mark.parametrize("kind", ["unknown flag", "bad value", "missing required", "bad config"])
def test_mistakes_in_flags_are_told_without_a_heavy_import(kind: str):
    cases = []
    for command, required in COMMANDS.items():
        words = {
            "unknown flag": [*required, "--no_such_flag=1"],
            "bad value": [*required, BAD_VALUES[command]],
            "missing required": required[:-1],
            "bad config": [*required, "--config=no-such-preset"],
        }[kind]
        if kind != "missing required" or required:
            cases.append([*command.split(), *words])
    for words, (code, out, err) in zip(cases, answers(cases), strict=True):
        assert code == 2 and not out and err.startswith("error: "), (words, code, err)


def test_the_barrier_names_who_imports(tmp_path):
    """The test above can fail: with flags and paths in order, the work itself needs torch."""
    row = tmp_path / "rows.jsonl"
    row.write_text('{"query": "q", "responses": ["a"]}\n')
    words = ["score", str(row), str(tmp_path / "o.jsonl"), "--scorer=gold:help_desk"]
    ((code, _, _),) = answers([words])
    assert code == "torch was imported"
