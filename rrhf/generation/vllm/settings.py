"""The settings of `--engine vllm`; a field's docstring is its help text. Nothing here imports
torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rrhf.generation.vllm.http import parse_url
from rrhf.ranges import INDEX, NOT_NEGATIVE, POSITIVE, Ranged


@dataclass(kw_only=True)
class VLLMSettings(Ranged):
    """Which vLLM server writes the responses, and how long to wait for it."""

    base_url: str = "http://127.0.0.1:8000"
    """Address of the vLLM server; `rrhf engine vllm start` starts one."""
    request_seconds: float = 600.0
    """Give up a request that has no complete answer after this many seconds, and repeat it."""
    server_wait_seconds: float = 120.0
    """How long to wait for a server that does not answer, such as one that is being restarted."""
    server_retries: int = 3
    """How often to repeat work that failed because of the server before the command stops."""
    check_weights: bool = True
    """In generate and evaluate: load the policy here too, and compare the log-probs of eight short
    texts with the server's. In training they are always compared."""
    canary_tolerance: float = 0.0
    """Largest difference of these log-probs, in nats per token (mean over a text); 0 = 0.001 if
    server and policy are float32, else 0.15."""
    sync_folder: str = field(default="", metadata={"names": "place"})
    """Folder in which policies are passed to the server, which must be able to read it; empty = in
    the output folder of a training, or the system's folder for temporary files. One in memory, such
    as /dev/shm, is faster."""

    RANGES: ClassVar = {
        "request_seconds": POSITIVE,
        "server_wait_seconds": NOT_NEGATIVE,
        "server_retries": INDEX,
        "canary_tolerance": NOT_NEGATIVE,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_url(self.base_url)
