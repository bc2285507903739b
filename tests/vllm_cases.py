"""Settings and jobs of online training with responses from a server."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ppo_cases import settings, without_clock

from rrhf.errors import AlreadyFinished
from rrhf.generation.vllm.settings import VLLMSettings
from rrhf.training.online import ppo

SCORER = "function:ppo_cases:has_e"


def config(world: Path, output_dir: Path | str, url: str, **changes: Any) -> ppo.PPOConfig:
    own = {"server_retries": 1, "request_seconds": 20.0, "server_wait_seconds": 10.0}
    own |= {name: changes.pop(name) for name in list(changes) if hasattr(VLLMSettings, name)}
    plain = {
        "engine": "vllm",
        "engine_settings": VLLMSettings(base_url=url, **own),
        "reward_model_name_or_path": SCORER,
        **({} if "method" in changes else {"share_trunk": True}),
    }
    return settings(world, output_dir, **{**plain, **changes})


def train_again(world: str, output_dir: str, url: str, **changes: Any) -> None:
    """A run, or its continuation where it was begun: what a restart script does."""
    begun = (Path(output_dir) / "settings.json").exists()
    with suppress(AlreadyFinished):
        ppo.train(config(Path(world), output_dir, url, resume_from_checkpoint=begun, **changes))


def rows(run: Path) -> list[dict[str, float]]:
    """Metrics, without what a clock, the memory or a server's failures say."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    found = [without_clock(json.loads(line)) for line in lines]
    return [{name: row[name] for name in row if name != "sampler_redraws"} for row in found]


def rollouts(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for line in lines if "canary_gap_prompt" in (row := json.loads(line))]
