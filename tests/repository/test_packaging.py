"""What the package holds and asks for, and that its launch files mean what they say."""

from __future__ import annotations

import configparser
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from places import ROOT

LAUNCH_FILES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_torch_stays_below_the_release_that_brings_cuda_to_every_machine(
    settings: configparser.ConfigParser,
):
    assert "torch>=2.10,<2.14" in lines(settings["options"]["install_requires"])
    assert settings["options"]["python_requires"] == ">=3.11"


def test_flash_attention_compiles_so_only_its_own_extra_names_it(
    settings: configparser.ConfigParser,
):
    extras = settings["options.extras_require"]
    names = {"deepspeed", "peft", "openai", "gguf", "flash", "report", "test", "dev"}
    assert set(extras) == names
    naming = [name for name in extras if "flash" in extras[name]]
    assert naming == ["flash"]


def test_a_wheel_holds_the_presets_and_the_command_but_no_tests(tmp_path: Path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "rrhf", source / "rrhf", ignore=ignore)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "README.md").write_text("read me")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run(
        [*build, "--wheel-dir", str(tmp_path), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entries,) = [name for name in names if name.endswith("entry_points.txt")]
        assert "rrhf = rrhf.cli.main:run" in archive.read(entries).decode()
    data = [*(ROOT / "rrhf").rglob("*.yaml"), *(ROOT / "rrhf").rglob("*.toml")]
    kept = {str(path.relative_to(ROOT)) for path in data}
    assert {"rrhf/presets/tiny.yaml", "rrhf/worlds/help_desk/topics.toml"} <= kept <= set(names)
    assert not [name for name in names if name.startswith(("tests", "configs"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.parametrize("path", LAUNCH_FILES, ids=lambda path: path.stem)
def test_every_launch_file_is_read_by_accelerate_as_it_is_meant(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type.value == kinds[path.stem]
    assert config.use_cpu is False
    if config.deepspeed_config:
        settings = json.loads(Path(config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == int(path.stem[-1])
        assert settings["gradient_accumulation_steps"] == 1
        # else weights are read in pieces, and no matrix is known from a vector any more
        assert config.deepspeed_config["zero3_init_flag"] is False
        # accelerate refuses a launch file that names what belongs into the DeepSpeed file
        assert "mixed_precision" not in yaml.safe_load(path.read_text())


def test_the_fsdp2_launch_file_asks_for_version_2_and_nothing_unknown():
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = ROOT / "configs" / "fsdp2.yaml"
    words = ["--config_file", str(path), "--num_processes", "2", "-m", "rrhf.cli.main", "train"]
    parser = launch_command_parser()
    known = set(vars(parser.parse_args(words)))
    assert set(yaml.safe_load(path.read_text())["fsdp_config"]) <= known
    arguments, _, _ = _validate_launch_command(parser.parse_args(words))
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert environment["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert arguments.master_port != "0"


def test_the_floors_hold():
    pytest.importorskip("importlinter", reason="import-linter is in the extra dev")
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
