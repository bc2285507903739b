"""Commands that ask a scripted server, and what they write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai  # noqa: F401 - so that killed jobs need not import it
from scripted_server import ScriptedServer

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.errors import StoppedBySignal
from rrhf.records import CandidateSet

KEY = "sk-canary/0123456789"
KEY_VARIABLE = "TEACHER_KEY"


def prompts_in(folder: Path, count: int = 4) -> Path:
    """Write a file of plain prompts."""
    path = folder / "in.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': f'question {n}'})}\n" for n in range(count)))
    return path


def server_words(*servers: ScriptedServer) -> list[str]:
    return [
        *("--engine", "openai_server", "--base_url", *(server.url for server in servers)),
        *("--api_key_env", KEY_VARIABLE, "--retry_wait_seconds", "0.01"),
    ]


def generate_words(
    server: ScriptedServer, prompts: Path, output: Path, *words: str, model: str = "a-teacher"
) -> list[str]:
    return [
        *("generate", "--model_name_or_path", model, "--prompts", str(prompts)),
        *("--output_file", str(output), "--max_new_tokens", "8"),
        *server_words(server),
        *words,
    ]


def run(words: list[str]) -> None:
    """A job of `kills.Zygote`: a command, as its process would do it."""
    if code := main(words):
        raise StoppedBySignal(code, "as the zygote reads a job's exit code")


def sets_of(path: Path) -> dict[str, CandidateSet]:
    """The sets of a candidate file by prompt; each prompt is there once."""
    sets = list(read_candidate_sets(path))
    found = {one.query: one for one in sets}
    assert len(found) == len(sets)
    return found


def manifest_of(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(
        path.with_name(f"{path.stem}.manifest.json").read_text(encoding="utf-8")
    )
    return value


def files_with(text: str, folder: Path) -> list[Path]:
    """The files below a folder whose bytes hold a text."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path for path in files if text.encode() in path.read_bytes()]


def length(prompts: list[str], responses: list[str], messages: object) -> list[float]:
    """A scorer: longer is better."""
    return [float(len(response)) for response in responses]
