"""The `rrhf` command: what it lists, how it fails, and with which exit code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import rrhf
from rrhf.cli import main as cli
from rrhf.cli import train
from rrhf.errors import AlreadyFinished, StoppedBySignal, UserError
from rrhf.training.methods import sft


def command_that(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    module = types.ModuleType("rrhf.cli.toy")
    module.main = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rrhf.cli.toy", module)
    monkeypatch.setitem(cli.COMMANDS, "toy", "a toy")


def test_help_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, summary in cli.COMMANDS.items():
        assert sum(line.split()[:1] == [name] and summary in line for line in lines) == 1


def test_every_listed_command_is_there():
    for name in cli.COMMANDS:
        assert callable(importlib.import_module(f"rrhf.cli.{name.replace('-', '_')}").main)


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rrhf {rrhf.__version__}\n"


def test_help_answers_without_torch():
    code = (
        "import sys; from rrhf.cli.main import main; code = main(['--help']); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["no command given", "usage: rrhf"]),
        (["trian"], ["unknown command 'trian'", "did you mean 'train'?"]),
        (["train"], ["no stage given", "usage: rrhf train"]),
        (["train", "rnak"], ["unknown stage 'rnak'", "did you mean 'rank'?"]),
        (["fetch"], ["rrhf fetch needs also", "--model", "--output_dir"]),
        (["fetch", "gpt5", "d"], ["'gpt5'", "one of smollm2"]),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_2(
    argv: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and "Traceback" not in err
    for part in parts:
        assert part in err


def test_how_a_command_ends_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def ends_with(end: BaseException | int) -> int:
        def run(argv: list[str]) -> int:
            assert argv == ["--a", "b c"]
            if isinstance(end, BaseException):
                raise end
            return end

        command_that(monkeypatch, run)
        return cli.main(["toy", "--a", "b c"])

    assert ends_with(0) == 0
    assert ends_with(UserError("x.json:3: score: NaN; give a number")) == 2
    assert "x.json:3: score: NaN; give a number" in capsys.readouterr().err
    assert ends_with(StoppedBySignal(75, "checkpoint written to runs/a")) == 75
    assert "checkpoint written to runs/a" in capsys.readouterr().err
    assert ends_with(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        ends_with(ZeroDivisionError())


def test_train_lists_its_stages(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["train", "--help"]) == 0
    page = capsys.readouterr().out
    for stage, (_, _, summary) in train.STAGES.items():
        assert f"{stage} " in page and summary in page
    assert set(train.STAGES) == {"sft", "reward", "rank", "iterative", "ppo"}


def test_resuming_a_finished_training_ends_as_training_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def finished(config: sft.SFTConfig) -> Path:
        raise AlreadyFinished(Path("out/policy"))

    monkeypatch.setattr(sft, "train", finished)
    (tmp_path / "manifest.json").write_text('{"status": "complete"}')  # its inputs may be gone
    words = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--data_path", "d"]
    assert cli.main(["train", "sft", *words, "--resume_from_checkpoint"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("The run is complete already")
    assert shown.endswith("Trained model: out/policy\n")


def test_the_console_command_runs():
    done = subprocess.run(
        [sys.executable, "-m", "rrhf.cli.main", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"rrhf {rrhf.__version__}\n")


def test_a_reader_that_goes_away_leaves_no_traceback():
    for arguments in (["fetch", "--help"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "rrhf.cli.main", *arguments],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writer)
        assert done.stderr == "" and done.returncode == 1


def test_what_deepspeed_says_goes_to_stderr_and_results_alone_to_stdout(tmp_path: Path) -> None:
    script = tmp_path / "speak.py"
    script.write_text(
        "import logging, sys\n"
        "from rrhf.cli.terminal import configure_logging\n"
        "configure_logging()\n"
        "theirs = logging.getLogger('DeepSpeed')\n"
        "theirs.propagate = False\n"
        "theirs.addHandler(logging.StreamHandler(sys.stdout))\n"
        "theirs.warning('Setting accelerator to CPU. If you have GPU ...')\n"
        "theirs.warning('the bucket is too small')\n"
        "print('result')\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "result\n"
    assert done.stderr == "the bucket is too small\n"
