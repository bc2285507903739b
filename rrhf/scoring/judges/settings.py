"""The settings of a judge, which follow its name or stand in a YAML file.

judge:rubric#model=MODEL#base_url=http://127.0.0.1:8000/v1
judge:my_judge.yaml#temperature=0.5
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from rrhf.endpoints.settings import COMPANY_URL, EndpointSettings, host_of
from rrhf.errors import UserError
from rrhf.ranges import COUNT, NOT_NEGATIVE, SEED
from rrhf.scoring.judges.presets import PRESETS
from rrhf.scoring.settings_in_names import made_settings, split_settings


@dataclass(kw_only=True)
class JudgeSettings(EndpointSettings):
    """How a model judges responses, and by which server it is asked."""

    model: str
    """Name of the model, as its server knows it."""

    preset: Literal["rubric", "wombat", "pairwise", "listwise"] = "rubric"
    """What is asked: grades of one response, grades or a ranking of all responses to a prompt, or
    which of two is better."""

    prompt_file: str = ""
    """File with your own prompt instead of the preset's; it holds the preset's placeholders, such
    as {prompt} and {response}, and the form of the answer is added to it."""

    structured: Literal["auto", "on", "off"] = "auto"
    """Ask the server to force the answer's form (response_format json_schema): auto = if it does
    not refuse."""

    temperature: float = 0.0
    """Sampling temperature of the judge."""

    max_tokens: int = 512
    """Maximum length of an answer, reasoning included."""

    seed: int = 0
    """Seed of the order in which wombat and listwise show the responses to a prompt."""

    ledger: str = ""
    """File in which every paid answer is kept, so that nothing is paid for twice; empty = a file in
    the folder judge_answers."""

    RANGES: ClassVar = {"temperature": NOT_NEGATIVE, "max_tokens": COUNT, "seed": SEED}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.api != "chat":
            raise UserError(f"#api={self.api}: judges are asked by chat; leave it out")
        if self.seed and self.preset not in ("wombat", "listwise"):
            raise UserError(
                f"#seed={self.seed}: judge:{self.preset} shows the responses in no drawn order; "
                "leave it out"
            )
        if self.dry_run:
            raise UserError("#dry_run: judges have none; #max_requests and #max_cost set limits")


def judge_settings(name: str, hosts: Sequence[str] | None = ()) -> JudgeSettings:
    """Read the settings of a judge from its name, and from the file that it names.

    Args:
        name: "judge:PRESET" or "judge:FILE", and settings after it.
        hosts: hosts, other than this machine, that prompts and responses may be sent to; None =
            any, since nothing is sent.

    Raises:
        UserError: there is no such preset or file, or a setting does not fit.
    """
    plain, given = split_settings(name)
    target = plain.partition(":")[2]
    values: dict[str, Any] = {}
    if target in PRESETS:
        values["preset"] = target
    elif target.endswith((".yaml", ".yml")):
        values |= _settings_file(target)
    else:
        raise UserError(
            f"{plain}: there is no such judge; choose one of "
            f"{', '.join(f'judge:{preset}' for preset in PRESETS)}, or name a settings file "
            "(judge:FILE.yaml)"
        )
    values |= given
    if "send_prompts_to" in values:
        raise UserError(
            f"{plain}: send_prompts_to is no setting of a judge, since a settings file of somebody "
            "else could name any host; leave it out and name the hosts with --scorer_hosts"
        )
    if hosts is None:
        hosts = [host_of(url) for url in _texts(values.get("base_url", COMPANY_URL))]
    try:
        return made_settings(JudgeSettings, values | {"send_prompts_to": list(hosts)}, plain)
    except UserError as error:
        raise UserError(as_settings(str(error))) from error


def _texts(value: Any) -> list[str]:
    return value.split("|") if isinstance(value, str) else list(value)


def as_settings(message: str) -> str:
    """Turn the flags that a message names into settings of a judge, and hosts into the flag for
    them."""
    known = {item.name for item in fields(JudgeSettings)}

    def renamed(found: re.Match[str]) -> str:
        if found.group(1) == "send_prompts_to":
            return "--scorer_hosts"
        return f"#{found.group(1)}" if found.group(1) in known else found.group(0)

    return re.sub(r"--([a-z_]+)", renamed, message)


def _settings_file(path: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"judge:{path}: the file cannot be read ({error})") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"judge:{path}: the file must hold settings, each as NAME: VALUE")
    return value
