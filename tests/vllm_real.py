"""A real vLLM server, where the variable RRHF_VLLM_PYTHON names an environment that has one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from kills import child_environment
from tiny import byte_level_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rrhf.generation.vllm.start import HOST

PYTHON = os.environ.get("RRHF_VLLM_PYTHON", "")
needs_vllm = pytest.mark.skipif(
    not PYTHON, reason="RRHF_VLLM_PYTHON names no Python of an environment with vLLM"
)
START_SECONDS = 240.0


def save_head_dim_32(folder: Path) -> Path:
    """The smallest heads that vLLM runs on a CPU; output layer and embeddings share weights."""
    tokenizer = byte_level_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class RealServer:
    """A server that `rrhf engine vllm start` starts, or another command.

    Args:
        model: the model's folder.
        log: where it writes.
        command: in place of `rrhf engine vllm start MODEL`; gets the port appended.
        more: further arguments.
    """

    def __init__(
        self, model: Path, log: Path, command: Sequence[str] = (), more: Sequence[str] = ()
    ) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port, self.log = int(probe.getsockname()[1]), log
        usual = [sys.executable, "-m", "rrhf.cli.main", "engine", "vllm", "start", str(model)]
        self._words = [*(command or usual), *more, "--port", str(self.port)]
        self.start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        """Start it, and return at once."""
        environment = {**child_environment(), "VLLM_SERVER_DEV_MODE": "1"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                self._words, stdout=out, stderr=out, env=environment, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until it answers."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self._process.poll() is None, self.log.read_text()[-2000:]
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.url}/health", timeout=5),
            ):
                return
            time.sleep(0.5)
        raise AssertionError(f"no server after {START_SECONDS:g} s: {self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL the server and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def real_server(
    model: Path, log: Path, command: Sequence[str] = (), more: Sequence[str] = ()
) -> Iterator[RealServer]:
    """A server that answers; it is killed at the end."""
    server = RealServer(model, log, command, more)
    try:
        server.wait()
        yield server
    finally:
        server.kill()
