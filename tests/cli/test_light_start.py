"""Help and mistakes are answered before torch or transformers is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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
    "engine vllm start": ["m"],
    "serve-reward": ["r"],
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
    "evaluate-reward": ["--output_dir=o", "--data_path=p", "--scorers=r"],
    "compare": ["rows"],
    "compare --world=help_desk": [],
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
    "engine vllm start": "--port=-1",
    "serve-reward": "--port=-1",
    "response-gen": "--num_return_sequences=0",
    "train sft": "--label_smoothing=2",
    "train reward": "--loss_type=dpo",
    "train rank": "--rrhf_weight=-1",
    "train iterative": "--num_rounds=0",
    "train ppo": "--kl_estimator=k9",
    "evaluate": "--confidence=7",
    "evaluate-reward": "--calibration_bins=0",
    "compare": "--width=wide",
    "compare --world=help_desk": "--methods=dpi",
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
    cases += [["--help"], ["train", "--help"], ["data", "--help"]]
    for words, (code, out, err) in zip(cases, answers(cases), strict=True):
        assert code == 0 and out.startswith("usage: ") and not err, (words, code, err)


def test_settings_of_a_server_are_refused_without_a_heavy_import():
    words = ["generate", "--model_name_or_path=m", "--prompts=p", "--output_file=o"]
    words += ["--engine=openai_server"]
    cases = [[*words, "--help"], words, [*words, "--base_url=http://127.0.0.1:9/v1", "--bf16"]]
    told = ["--base_url", "--send_prompts_to api.openai.com", "--bf16 True"]
    for part, (code, out, err) in zip(told, answers(cases), strict=True):
        assert isinstance(code, int) and part in out + err, (code, out, err)


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


@dataclass(frozen=True)
class Places:
    """What lies on the disk: nothing that a heavy package would have to make."""

    folder: Path

    @property
    def model(self) -> str:
        return self._model("model", "LlamaForCausalLM")

    @property
    def reward_model(self) -> str:
        return self._model("reward", "LlamaForSequenceClassification")

    def _model(self, name: str, architecture: str) -> str:
        path = self.folder / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
        return str(path)

    @property
    def data(self) -> str:
        path = self.folder / "rows.jsonl"
        path.write_text('{"query": "q", "responses": ["a", "b"], "scores": [0, 1]}\n')
        return str(path)

    @property
    def missing(self) -> str:
        return str(self.folder / "nothing.jsonl")

    @property
    def new(self) -> str:
        return str(self.folder / "new")

    @property
    def run(self) -> str:
        """A run that was begun."""
        path = self.folder / "run"
        path.mkdir(exist_ok=True)
        (path / "manifest.json").write_text('{"status": "complete"}')
        return str(path)

    @property
    def in_a_file(self) -> str:
        """A place below a file, where nothing can be written."""
        return f"{self.data}/below"


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def path_mistakes(p: Places) -> list[tuple[list[str], str]]:
    """Words in which one path is wrong, and what the message must hold."""
    good: dict[str, dict[str, str]] = {
        "generate": {"model_name_or_path": p.model, "prompts": p.data, "output_file": p.new},
        "score": {"input_file": p.data, "output_file": p.new, "scorer": p.reward_model},
        "train sft": {"model_name_or_path": p.model, "data_path": p.data, "output_dir": p.new},
        "train reward": {"model_name_or_path": p.model, "data_path": p.data, "output_dir": p.new},
        "train rank": {"model_name_or_path": p.model, "data_path": p.data, "output_dir": p.new},
        "evaluate": {"model_name_or_path": p.model, "prompts": p.data, "output_dir": p.new},
        "compare": {"rows": p.run, "output": p.new},
        "response-gen": {"model_name_or_path": p.model, "output_dir": p.new, "prompts": p.data},
        "demo": {"output_dir": p.new},
        "compare --world=help_desk": {"output_dir": p.new},
    }
    for stage in ("train iterative", "train ppo"):
        good[stage] = {"model_name_or_path": p.model, "output_dir": p.new}
        good[stage] |= {"train_datasets": p.data, "reward_model_name_or_path": p.reward_model}
    good["response-gen"]["scorer"] = p.reward_model
    cases = []

    def wrong(command: str, name: str, value: str, told: str = "") -> None:
        words = [f"--{key}={given}" for key, given in (good[command] | {name: value}).items()]
        cases.append(([*command.split(), *words], told or value))

    for command, names in good.items():
        for name in names:
            if name.startswith("output"):
                wrong(command, name, p.in_a_file, p.data)
                if name == "output" or name == "output_file":
                    wrong(command, name, f"{p.new}/", f"{p.new}/: names a folder")
            else:
                wrong(command, name, p.missing)
        if command.startswith("train"):
            wrong(command, "output_dir", p.run, "--resume_from_checkpoint")
            wrong(command, "attn_implementation", "flash_attention_2", "add --bf16")
            wrong(
                command, "attn_implementation", "flash_attention_2", "flash-attn is not installed"
            )
            cases[-1][0].append("--bf16")
        if command.startswith(("train", "generate", "evaluate")):
            wrong(command, "model_name_or_path", p.folder.name, "no such model folder")
    begun = p.folder / "rounds" / "round-1"
    begun.mkdir(parents=True)
    (begun / "candidates.jsonl.rank0.jsonl").write_text("{}\n")
    (begun.parent / "manifest.json").write_text('{"status": "unfinished"}')
    wrong("train iterative", "output_dir", str(begun.parent), "holds an unfinished run")
    for command, name in (
        ("score", "scorer"),
        ("evaluate", "scorer"),
        ("train ppo", "reward_model_name_or_path"),
        ("train iterative", "reward_model_name_or_path"),
    ):
        wrong(command, name, p.model, "not a reward model")
        wrong(command, name, "gold:rome", "gold:help_desk")
        wrong(command, name, "function:nowhere:f", "nowhere")
        wrong(command, name, "nowhere:Scorer", "nowhere")
        wrong(command, name, "json:dumps", "function:json:dumps")
        wrong(command, name, "gold:nowhere:World", "nowhere")
        wrong(command, name, "function:json:nothing", "nothing")
    wrong("train rank", "eval_data_path", p.missing)
    wrong("train rank", "data_path", f"rm-static:half:{p.data}", "not a proportion")
    wrong("train rank", "data_path", "rm-statc", "rm-static")
    wrong("train reward", "validation_datasets", p.missing)
    wrong("train ppo", "reward_critic_model_name_or_path", p.missing)
    wrong("train sft", "num_train_epochs", "0", "must be above 0, or set --max_steps")
    wrong("train sft", "report_to", "wandb", "wandb is not installed")
    wrong("train rank", "layout", "varlen_attention", "add --bf16")
    wrong("generate", "chat_format", "alpaka", "alpaca")
    wrong("generate", "engine", "magic", "choose one of local")
    wrong("evaluate", "metrics", "reward,rewrd", "unknown metric 'rewrd'")
    wrong("train ppo", "max_steps", "0", "--max_steps 0")
    wrong("evaluate", "baseline", p.missing)
    wrong("evaluate", "gold", "moon", "unknown world 'moon'")
    cases.append((["compare", "--world=moon"], "unknown world 'moon'"))
    wrong("evaluate", "reference_model_name_or_path", p.missing)
    return cases


def test_mistakes_in_paths_are_told_without_a_heavy_import(places: Places):
    cases = path_mistakes(places)
    before = sorted(places.folder.rglob("*"))
    for (words, told), (code, out, err) in zip(
        cases, answers([words for words, _ in cases]), strict=True
    ):
        assert code == 2 and not out and err.startswith("error: "), (words, code, err)
        assert told in err and "Traceback" not in err, (words, err)
    assert sorted(places.folder.rglob("*")) == before


def test_the_barrier_names_who_imports(places: Places):
    """The tests above can fail: with flags and paths in order, the work itself needs torch."""
    train = ["train", "sft", f"--model_name_or_path={places.model}", f"--data_path={places.data}"]
    words = [
        ["score", places.data, places.new, "--scorer=gold:help_desk"],
        [*train, f"--output_dir={places.new}"],
    ]
    assert [code for code, _, _ in answers(words)] == ["torch was imported"] * 2


def test_a_finished_run_is_resumed_without_its_data(places: Places):
    """Whether it is the same run is the command's to say; nothing of it is read again."""
    words = [f"--model_name_or_path={places.missing}", f"--data_path={places.missing}"]
    words = ["train", "sft", *words, f"--output_dir={places.run}"]
    ((code, _, err), again) = answers([[*words, "--resume_from_checkpoint"], words])
    assert code == "torch was imported" and not err
    assert again[0] == 2


def test_another_process_of_a_launch_may_come_when_the_run_has_begun(
    places: Places, monkeypatch: pytest.MonkeyPatch
):
    words = ["train", "sft", f"--model_name_or_path={places.model}", f"--data_path={places.data}"]
    monkeypatch.setenv("RANK", "1")
    ((code, _, _),) = answers([[*words, f"--output_dir={places.run}"]])
    assert code == "torch was imported"


def test_a_tilde_is_the_home_folder_in_flags_and_files(
    places: Places, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(places.folder))
    assert places.model and places.data
    (places.folder / "c.yaml").write_text(
        "model_name_or_path: ~/model\ndata_path: hh:0:x.jsonl, rows:1:~/rows.jsonl,~/rows.jsonl\n"
    )
    good = ["train", "sft", "--config=~/c.yaml", "--output_dir=~/new"]
    bad = ["train", "sft", "--config=~/c.yaml", "--output_dir=~/rows.jsonl/new"]
    missing = ["generate", "--model_name_or_path=~/model", "--prompts=~/no.jsonl"]
    found = answers([good, bad, [*missing, "--output_file=~/o.jsonl"]])
    assert found[0][0] == "torch was imported"
    assert found[1][0] == 2 and f"{places.folder}/rows.jsonl" in found[1][2]
    assert found[2][0] == 2 and f"{places.folder}/no.jsonl: " in found[2][2]
