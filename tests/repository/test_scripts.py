"""The shell scripts, run with stand-ins for what they call: what is called, with which words.

Every path in these tests holds a blank and a semicolon. The stand-ins write down their arguments
one a line, the call's own name first.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT
from processes import is_gone

SCRIPTS = ["demo.sh", "test.sh", "train.sh", "ppo.sh", ".ci/run"]
SCRIPTS += ["configs/environment.sh", "configs/launch.sh"]
SCRIPTS += ["data_generation/response_gen.sh", "data_generation/scoring_responses.sh"]

RECORD = """
{
    printf '%s\\n' "CALL ${0##*/}" "$@" "CUDA=${CUDA_VISIBLE_DEVICES-unset}"
    [[ -z ${ACCELERATE_USE_DEEPSPEED-} ]] || echo "DEEPSPEED=$ACCELERATE_DEEPSPEED_CONFIG_FILE"
} >>"$CALLS"
"""
RECORDER = f"#!/bin/bash\n{RECORD}"
PYTHON = """#!/bin/bash
case "$*" in
    *gpu_preset.py) echo "$PRESET"; exit ;;
    *sys.prefix*) echo "$PREFIX"; exit ;;
    *version_info*) exit "${TOO_OLD:-0}" ;;
    "-m pip --version") exit 0 ;;
    --version) echo Python 3.11.0; exit ;;
    "-m venv "*)
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        echo 'export VIRTUAL_ENV=made PATH="$repository_root/.venv/bin:$PATH"' >"$3/bin/activate"
        exit
        ;;
    *install*) [[ -z ${FAIL:-} ]] || exit 7 ;;
esac
"""


@dataclass
class Machine:
    """A copy of the scripts and a PATH of stand-ins."""

    root: Path
    bin: Path
    calls_file: Path
    environment: dict[str, str]

    def stand_in(self, name: str, text: str = RECORDER) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def run(
        self, script: str, *words: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.root / script), *words],
            env=self.environment | environment,
            cwd=cwd or self.root.parent,
            capture_output=True,
            text=True,
            timeout=540,
        )

    def calls(self) -> list[list[str]]:
        """The calls so far, oldest first: name, arguments; the list is emptied."""
        if not self.calls_file.exists():
            return []
        calls: list[list[str]] = []
        for line in self.calls_file.read_text().splitlines():
            if line.startswith("CALL "):
                calls.append([line.removeprefix("CALL ")])
            else:
                calls[-1].append(line)
        self.calls_file.unlink()
        return calls


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Scripts in a folder with an awkward name, no GPU, an active environment, `rrhf` on PATH."""
    root = tmp_path / "a repo; touch oops"
    for script in [*SCRIPTS, "configs/gpu_preset.py", "setup.cfg", "pyproject.toml"]:
        (root / script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / script, root / script)
    made = Machine(
        root=root,
        bin=tmp_path / "stand ins; here",
        calls_file=tmp_path / "calls",
        environment={
            "PATH": f"{tmp_path / 'stand ins; here'}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "CALLS": str(tmp_path / "calls"),
            "PREFIX": str(tmp_path),
            "VIRTUAL_ENV": str(tmp_path),
            "PRESET": "bf16",
        },
    )
    made.bin.mkdir()
    made.stand_in("rrhf")
    made.stand_in("accelerate")
    made.stand_in("nvidia-smi", "#!/bin/bash\nexit 9\n")
    made.stand_in("python", PYTHON + RECORD)
    return made


def with_gpus(machine: Machine, count: int) -> None:
    lines = "\n".join(f"GPU {i}: Big (UUID: GPU-{i})\n  MIG 1g Device 0: (x)" for i in range(count))
    machine.stand_in("nvidia-smi", f"#!/bin/bash\ncat <<'X'\n{lines}\nX\n")


MODEL, OUT, DATA = "my model; rm -rf x", "$HOME/out 'put'", 'da"ta*.json'
REWARD = "function:my module:it's"
TASK = ["train", "rank", "--model_name_or_path", MODEL, "--output_dir", OUT, "--data_path", DATA]
PPO_TASK = ["train", "ppo", "--model_name_or_path", MODEL, "--reward_model_name_or_path", REWARD]
PPO_TASK += ["--output_dir", OUT, "--train_datasets", DATA]
EXTRA = ["--chat_format", "raw", "--note", "a  b;c"]
RANKS = ["python", "-m", "rrhf.cli.launch"]
TORCHRUN = [*RANKS, "python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def launched(machine: Machine, *words: str, **environment: str) -> list[str]:
    done = machine.run("train.sh", MODEL, OUT, DATA, *words, **environment)
    assert done.returncode == 0, done.stderr
    (call,) = machine.calls()
    return call


def test_train_on_the_cpu(machine: Machine):
    assert launched(machine, *EXTRA) == ["rrhf", *TASK, *EXTRA, "CUDA="]


def test_train_on_one_gpu_takes_the_preset_that_fits_it_below_the_users_flags(machine: Machine):
    with_gpus(machine, 1)
    chosen = ["--config", "bf16-flash"]
    assert launched(machine, *EXTRA, PRESET="bf16-flash") == [
        *["rrhf", *TASK, *chosen, *EXTRA, "CUDA=unset"]
    ]
    assert launched(machine, *EXTRA, PRESET="float32") == ["rrhf", *TASK, *EXTRA, "CUDA=unset"]


def test_train_where_torch_cannot_use_the_gpus_says_so_and_goes_on(machine: Machine):
    with_gpus(machine, 2)
    done = machine.run("train.sh", MODEL, OUT, DATA, PRESET="none")
    assert "cannot use the GPUs" in done.stderr
    assert machine.calls() == [["rrhf", *TASK, "CUDA="]]


def test_train_on_many_gpus_is_launched_by_accelerate(machine: Machine):
    with_gpus(machine, 4)
    configs = machine.root / "configs"
    start = [*RANKS, "accelerate", "launch", "--config_file"]
    end = ["-m", "rrhf.cli.main", *TASK, "--config", "bf16", *EXTRA, "CUDA=unset"]
    assert launched(machine, *EXTRA) == [
        *[*start, str(configs / "fsdp2.yaml"), "--num_processes", "4", *end]
    ]
    assert launched(machine, "--launch", "ddp", *EXTRA, "--num_processes=3") == [
        *[*start, str(configs / "ddp.yaml"), "--num_processes", "3", *end]
    ]
    zero = ["--deepspeed_config_file", str(configs / "deepspeed_zero3.json")]
    assert launched(machine, *EXTRA, "--launch=zero3") == [
        *[*start, str(configs / "zero3.yaml"), *zero, "--num_processes", "4", *end]
    ]
    own = machine.root.parent / "my launch.yaml"
    own.touch()
    assert launched(machine, *EXTRA, "--launch", str(own)) == [*start, str(own), *end]
    assert launched(machine, "--launch", "cpu") == ["rrhf", *TASK, "CUDA="]
    assert launched(machine, "--launch", "gpu") == [
        *["rrhf", *TASK, "--config", "bf16", "CUDA=unset"]
    ]


@pytest.mark.parametrize(
    ("visible", "launch"), [("", "cpu"), ("-1", "cpu"), ("2", "gpu"), ("0,3", "fsdp2")]
)
def test_train_counts_only_the_gpus_that_are_visible(machine: Machine, visible: str, launch: str):
    with_gpus(machine, 8)
    done = machine.run("train.sh", MODEL, OUT, DATA, CUDA_VISIBLE_DEVICES=visible)
    assert f"launch: {launch}\n" in done.stderr
    (call,) = machine.calls()
    assert ("accelerate" in call) == (launch == "fsdp2")


def test_ddp_without_gpus_runs_on_two_cpu_processes(machine: Machine):
    end = ["-m", "rrhf.cli.main", *TASK, "CUDA=unset"]
    assert launched(machine, "--launch", "ddp") == [*TORCHRUN, "2", *end]
    assert launched(machine, "--launch", "ddp", "--num_processes", "3") == [*TORCHRUN, "3", *end]


@pytest.mark.parametrize("launch", ["zero2", "zero3"])
def test_deepspeed_without_gpus_runs_on_two_cpu_processes(machine: Machine, launch: str):
    """`accelerate launch` would start DDP, or two processes that know nothing of each other."""
    start = [*TORCHRUN, "2"]
    settings = f"DEEPSPEED={machine.root / 'configs' / f'deepspeed_{launch}.json'}"
    assert launched(machine, "--launch", launch, *EXTRA) == [
        *[*start, "-m", "rrhf.cli.main", *TASK, *EXTRA, "CUDA=unset", settings]
    ]


def test_ppo_is_launched_as_ranking_is(machine: Machine):
    words = [MODEL, REWARD, OUT, DATA]
    done = machine.run("ppo.sh", *words, *EXTRA)
    assert done.returncode == 0 and "Training on the CPU, launch: cpu" in done.stderr
    assert machine.calls() == [["rrhf", *PPO_TASK, *EXTRA, "CUDA="]]
    with_gpus(machine, 2)
    done = machine.run("ppo.sh", *words, "--launch", "zero2", *EXTRA, PRESET="bf16-flash")
    assert done.returncode == 0 and "Training on 2 GPU(s), launch: zero2" in done.stderr
    configs = machine.root / "configs"
    start = [*RANKS, "accelerate", "launch", "--config_file", str(configs / "zero2.yaml")]
    start += ["--deepspeed_config_file", str(configs / "deepspeed_zero2.json")]
    start += ["--num_processes", "2", "-m", "rrhf.cli.main"]
    end = ["--config", "bf16-flash", *EXTRA, "CUDA=unset"]
    assert machine.calls() == [[*start, *PPO_TASK, *end]]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["m", "r", "o"], "MODEL, REWARD, OUT and PROMPTS are needed"),
        (["m", "r", "o", "--launch"], "MODEL, REWARD, OUT and PROMPTS are needed"),
        (["m", "r", "o", "p", "--num_processes"], "--num_processes needs a value"),
    ],
)
def test_ppo_refuses_what_it_cannot_launch(machine: Machine, words: list[str], part: str):
    done = machine.run("ppo.sh", *words)
    assert (done.returncode, done.stdout) == (2, "") and part in done.stderr
    assert machine.calls() == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "MODEL, OUT and DATA are needed"),
        (["m", "o"], "MODEL, OUT and DATA are needed"),
        (["m", "o", "--launch"], "MODEL, OUT and DATA are needed"),
        (["m", "o", "d", "--launch"], "--launch needs a value"),
        (["m", "o", "d", "--launch", "fsdp3"], "none of cpu, gpu, ddp, fsdp2, zero2, zero3"),
        (["m", "o", "d", "--launch", "fsdp2"], "needs GPUs"),
        (["m", "o", "d", "--num_processes", "0"], "a whole number above 0"),
    ],
)
def test_train_refuses_what_it_cannot_launch(machine: Machine, words: list[str], part: str):
    done = machine.run("train.sh", *words)
    assert (done.returncode, done.stdout) == (2, "") and part in done.stderr
    assert machine.calls() == []


def test_the_exit_code_of_the_command_is_the_scripts(machine: Machine):
    machine.stand_in("rrhf", "#!/bin/bash\nexit 75\n")
    assert machine.run("train.sh", MODEL, OUT, DATA).returncode == 75
    assert machine.run("data_generation/response_gen.sh", MODEL, OUT).returncode == 75


@pytest.mark.parametrize(
    ("script", "words", "task"),
    [
        ("response_gen.sh", [MODEL, OUT, "true"], ["response-gen", MODEL, OUT, "true"]),
        (
            "scoring_responses.sh",
            [DATA, OUT],
            ["score", "--input_file", DATA, "--output_file", OUT],
        ),
    ],
)
def test_generation_and_scoring_hand_over(
    machine: Machine, script: str, words: list[str], task: list[str]
):
    script = f"data_generation/{script}"
    assert machine.run(script, *words, *EXTRA).returncode == 0
    assert machine.calls() == [["rrhf", *task, *EXTRA, "CUDA=unset"]]
    with_gpus(machine, 3)
    assert machine.run(script, *words, *EXTRA).returncode == 0
    start = [*TORCHRUN, "3"]
    assert machine.calls() == [[*start, "-m", "rrhf.cli.main", *task, *EXTRA, "CUDA=unset"]]
    done = machine.run(script, words[0])
    assert (done.returncode, machine.calls()) == (2, [])
    assert "needed, in this order" in done.stderr


def test_each_script_that_takes_arguments_explains_itself(machine: Machine):
    usages = {"train.sh": "MODEL OUT DATA", "ppo.sh": "MODEL REWARD OUT PROMPTS"}
    for script, words in (usages | {"data_generation/response_gen.sh": "MODEL OUT"}).items():
        done = machine.run(script, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: bash {script} {words}")
    assert machine.calls() == []


def install_of(machine: Machine, extras: str) -> list[str]:
    pip = ["python", "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "-e"]
    return [*pip, f".{extras}", "CUDA=unset"]


def test_demo_installs_once_and_again_when_the_requirements_change(machine: Machine):
    demo = ["rrhf", "demo", "--seeds", "3", "--output_dir", "a;b", "CUDA=unset"]
    assert machine.run("demo.sh", *demo[2:-1]).returncode == 0
    assert machine.calls() == [install_of(machine, ""), demo]
    assert machine.run("demo.sh", *demo[2:-1]).returncode == 0
    assert machine.calls() == [demo]
    with (machine.root / "setup.cfg").open("a") as file:
        file.write("# more\n")
    assert machine.run("demo.sh", *demo[2:-1]).returncode == 0
    assert machine.calls() == [install_of(machine, ""), demo]


def test_test_installs_its_own_extra_and_runs_pytest_on_the_cores(machine: Machine):
    assert machine.run("test.sh", "-k", "a b").returncode == 0
    install, call = machine.calls()
    assert install == install_of(machine, "[test]")
    workers = str(min(os.cpu_count() or 1, 8, len(os.sched_getaffinity(0))))
    by_file = ["--dist", "loadfile"]
    assert call == ["python", "-m", "pytest", "-n", workers, *by_file, "-k", "a b", "CUDA=unset"]


def test_a_failed_installation_stops_the_script_and_is_tried_again(machine: Machine):
    assert machine.run("demo.sh", FAIL="1").returncode == 7
    assert machine.calls() == []
    assert machine.run("demo.sh").returncode == 0
    assert machine.calls() == [install_of(machine, ""), ["rrhf", "demo", "CUDA=unset"]]


def test_without_an_environment_one_is_made_beside_the_scripts(machine: Machine):
    (machine.bin / "python").rename(machine.bin / "python3.11")
    done = machine.run("demo.sh", VIRTUAL_ENV="")
    assert done.returncode == 0, done.stderr
    assert "Making the environment" in done.stderr
    assert (machine.root / ".venv" / "bin" / "python").is_file()
    assert machine.calls() == [install_of(machine, ""), ["rrhf", "demo", "CUDA=unset"]]
    assert "Making" not in machine.run("demo.sh", VIRTUAL_ENV="").stderr
    assert machine.calls() == [["rrhf", "demo", "CUDA=unset"]]


def test_no_python_that_is_new_enough_is_told(machine: Machine):
    for name in ("python3.11", "python3.12", "python3.13", "python3"):
        machine.stand_in(name, PYTHON)
    done = machine.run("demo.sh", VIRTUAL_ENV="", TOO_OLD="1")
    assert done.returncode != 0 and "no Python 3.11 or later found" in done.stderr
    assert machine.calls() == []


def test_train_uses_the_environment_beside_the_scripts_when_none_is_active(machine: Machine):
    binary = machine.root / ".venv" / "bin"
    binary.mkdir(parents=True)
    (machine.bin / "rrhf").rename(binary / "rrhf")
    shutil.copy(machine.bin / "python", binary / "python")
    (binary / "activate").write_text(
        'export VIRTUAL_ENV=here PATH="$repository_root/.venv/bin:$PATH"'
    )
    done = machine.run("train.sh", MODEL, OUT, DATA, VIRTUAL_ENV="")
    assert done.returncode == 0, done.stderr
    assert machine.calls() == [install_of(machine, ""), ["rrhf", *TASK, "CUDA="]]


def test_the_scripts_are_shellcheck_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_scripts_are_executable():
    for script in SCRIPTS:
        if not script.startswith("configs/"):  # those are sourced
            assert os.access(ROOT / script, os.X_OK), script


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_during_the_installation_ends_it_with_all_it_started(
    machine: Machine, number: int, code: int
) -> None:
    """pip is there, with a compiler of its own; both go, and the installation is not remembered."""
    alive = machine.root.parent / "alive"
    pip = f"#!/bin/bash\nif [[ $2 != pip ]]; then echo {machine.root.parent}; exit; fi\n"
    machine.stand_in("python", pip + f"sleep 600 & echo $! $$ >'{alive}.new'\n")
    with (machine.bin / "python").open("a") as file:
        file.write(f"mv '{alive}.new' '{alive}'\nwait\n")
    script = subprocess.Popen(
        ["bash", str(machine.root / "demo.sh")],
        env=machine.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not alive.exists():
        assert script.poll() is None
        time.sleep(0.02)
    script.send_signal(number)
    assert script.wait(540) == code
    for pid in alive.read_text().split():
        assert is_gone(int(pid))
    assert not list(machine.root.parent.glob(".rrhf-installed*"))


def test_a_signal_while_the_devices_are_looked_at_ends_the_script(machine: Machine) -> None:
    begun = machine.root.parent / "begun"
    machine.stand_in("nvidia-smi", f"#!/bin/bash\ntouch '{begun}'\nsleep 0.5\n")
    script = subprocess.Popen(
        ["bash", str(machine.root / "train.sh"), MODEL, OUT, DATA],
        env=machine.environment,
        stdout=subprocess.DEVNULL,
    )
    while not begun.exists():
        time.sleep(0.02)
    script.terminate()
    assert script.wait(540) == 75
    assert machine.calls() == []
