"""`rrhf generate`: parse, call, print; the work is in `rrhf.generation.stage`."""

from __future__ import annotations

from pathlib import Path

from rrhf.cli.places import read_settings
from rrhf.cli.terminal import print_once
from rrhf.commands import next_step
from rrhf.errors import EXIT_DONE
from rrhf.process_end import launched_place


def main(argv: list[str]) -> int:
    from rrhf.data.prompt_text import prompt_text
    from rrhf.generation.config import GenerateConfig

    config = read_settings(GenerateConfig, argv, "rrhf generate")
    from rrhf.generation.stage import generate_file

    output = generate_file(config, *launched_place())
    if prompt_text(config.prompts) is not None:
        print_once(_responses(output))
    scored = output.with_name(f"{output.stem}.scored.jsonl")
    step = next_step("rrhf", "score", output, scored, "--scorer", "REWARD_MODEL")
    print_once(f"Candidates: {output}; `{step}` scores them")
    return EXIT_DONE


def _responses(output: Path) -> str:
    """Format the responses to a prompt that was given on the command line."""
    from rrhf.data.candidate_files import read_candidate_sets

    written = [text for s in read_candidate_sets(output) for text in s.responses]
    return "\n".join(f"[{number}] {text}" for number, text in enumerate(written, start=1))
