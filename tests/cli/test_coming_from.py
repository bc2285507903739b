"""docs/coming_from.md: every command on it is run to what it makes.

Beyond what the page says, commands get only flags that make the work smaller.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from coming_from_cases import PAGE, ROOT, SECTIONS, command_of, fences, section, steps
from coming_from_world import build_things, filled
from command_results import NUM_PROMPTS, look_at

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets

STEPS = 2
SAMPLING = {"max_new_tokens": "6", "num_prompts": str(NUM_PROMPTS)}
SMALLER: dict[str, dict[str, str]] = {
    "generate": SAMPLING,
    "response-gen": SAMPLING,
    "evaluate": {**SAMPLING, "bootstrap_resamples": "20"},
    "compare": {"bootstrap_resamples": "20"},
    "train iterative": {**SAMPLING, "max_steps": str(STEPS), "num_rounds": "2"},
    "train ppo": {"max_steps": str(STEPS), "max_new_tokens": "6", "rollout_size": "8"},
}
# test_story_scripts starts these; here their commands are run without a process for each.
SCRIPTS_WITH_A_STORY = ("train.sh", "response_gen.sh", "scoring_responses.sh")


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the words in capitals stand for; the paths hold a blank."""
    return build_things(tmp_path_factory.mktemp("coming") / "my things")


def made_smaller(words: Sequence[str]) -> list[str]:
    """The words with flags that bound the work; where the page has them, with smaller values."""
    command, arguments = command_of(words)
    bounds = SMALLER.get(command, {})
    if command.startswith("train ") and "--max_steps" not in arguments:
        bounds = {"max_steps": str(STEPS), **bounds}
    smaller = list(words)
    for name, value in bounds.items():
        if f"--{name}" in smaller:
            smaller[smaller.index(f"--{name}") + 1] = value
        else:
            smaller += [f"--{name}", value]
    return smaller


def run_script(words: Sequence[str]) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "VIRTUAL_ENV": sys.prefix,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("title", SECTIONS)
def test_the_commands_of_a_section_run_and_make_what_they_say(
    title: str, things: dict[str, str], tmp_path: Path
) -> None:
    """One after the other, in one folder, as a reader would; each is looked at before the next."""
    things = things | {"OUT": str(tmp_path / "my work")}
    shells = fences(section(title), "bash")
    assert shells, "the section begins with commands"
    for step in (step for shell in shells for step in steps(shell)):
        words = [filled(word, things) for word in step.words]
        if words[0] == "cat":
            Path(words[1]).write_text(filled(step.content, things))
            continue
        words = made_smaller(words)
        if words[0] == "bash" and Path(words[1]).name not in SCRIPTS_WITH_A_STORY:
            run_script(words)
        else:
            command, arguments = command_of(words)
            assert main([*command.split(), *arguments]) == 0, shlex.join(words)
        look_at(*command_of(words))


def test_no_command_stands_outside_the_sections() -> None:
    text = PAGE.read_text()
    in_sections = [fence for title in SECTIONS for fence in fences(section(title), r"\w*")]
    assert fences(text, r"\w*") == in_sections
    assert text.count("\n## ") == len(SECTIONS)


def test_the_python_on_the_page_registers_a_data_set(
    things: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rrhf.data import sources

    monkeypatch.setattr(sources, "REGISTRY", dict(sources.REGISTRY))
    monkeypatch.setattr(sources, "ALIASES", dict(sources.ALIASES))
    (program,) = [f for title in SECTIONS for f in fences(section(title), "python")]
    exec(filled(program, things | {"OUT": str(tmp_path)}), {})
    sets = list(read_candidate_sets(tmp_path / "mine.jsonl"))
    assert len(sets) == 5  # half of ten, asked for by the alias
    assert {c.source for s in sets for c in s.candidates} == {"human:chosen", "human:rejected"}
