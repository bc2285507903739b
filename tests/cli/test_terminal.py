"""One voice on the terminal: each message once, warnings counted, libraries' own talk left out."""

import logging
import subprocess
import sys

import pytest

START = "from rrhf.cli.terminal import configure_logging, print_repeats; configure_logging()\n"


def run(code, **environment):
    """What a process that talks as a command does writes to stderr."""
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        capture_output=True,
        text=True,
        check=True,
        env=_environment() | environment,
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


def _environment():
    import os

    return {k: v for k, v in os.environ.items() if k not in ("RANK", "PYTHONWARNINGS")}


LOG = "import logging, warnings; log = logging.getLogger('rrhf.training.methods.rank')\n"


def test_a_warning_is_shown_once_and_its_count_at_the_end():
    code = LOG + (
        "for _ in range(3): log.warning('3 prompts do not fit'); log.info('the engine is x')\n"
        "log.warning('another'); print_repeats(); print_repeats()\n"
    )
    assert run(code) == [
        "3 prompts do not fit",
        "the engine is x",
        "another",
        "this warning came 3 times: 3 prompts do not fit",
    ]


def test_lines_of_progress_may_be_alike():
    code = LOG + "for _ in range(2): logging.getLogger('rrhf.progress').info('score: 1 of 2')\n"
    assert run(code) == ["score: 1 of 2"] * 2


@pytest.mark.parametrize(("rank", "lines"), [("0", 4), ("1", 2)])
def test_other_processes_speak_of_their_own_share_alone(rank, lines):
    code = LOG + (
        "log.warning('3 prompts do not fit'); logging.getLogger('rrhf.progress').info('1 of 2')\n"
        "log.error('broken')\n"
        "logging.getLogger('rrhf.generation.local.engine').warning('no memory')\n"
    )
    said = run(code, RANK=rank)
    assert len(said) == lines and said[-2:] == ["broken", "no memory"]


WARN = LOG + (
    "for module in ('torch.nn.modules', 'transformers.modeling_utils', 'torch', 'accelerate.x',\n"
    "               'torch.cuda', 'torchmetrics', 'users_scorer'):\n"
    "    warnings.warn_explicit(f'from {module}', FutureWarning, 'file.py', 1, module)\n"
)


def test_what_libraries_warn_of_their_own_code_stays_out():
    heard = [line.split("Warning: ")[1] for line in run(WARN) if "Warning: " in line]
    assert heard == ["from torch.cuda", "from torchmetrics", "from users_scorer"]


def test_pythons_switch_brings_it_back():
    assert len(run(WARN, PYTHONWARNINGS="default")) == 7


def test_messages_stand_above_a_bar(monkeypatch, capsys):
    from rrhf.cli.terminal import Voice

    voice = Voice()
    voice.emit(logging.LogRecord("rrhf.x", logging.INFO, "", 1, "hello %s", ("you",), None))
    assert capsys.readouterr().err == "hello you\n"
