"""`rrhf response-gen MODEL OUT_DIR [true|false]`: `rrhf generate`, then `rrhf score`, in one go.

The command takes the flags of both. A flag that both have, such as `bf16`, applies to both;
`generate_bf16` and `score_bf16` apply to one of them. Unless one of these flags is given, responses
are sampled in the number format that is faster here, and scored in float32. The default prompts and
search are those of RRHF's published script: Dahoas/rm-static and diverse beam search with four
responses, in addition to the two responses of the data set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrhf.cli.config_files import ConfigFiles
from rrhf.cli.fields import Flag, choices_of, flags_of
from rrhf.cli.flags import asks_for_all, asks_for_help, build, look_up, read_values
from rrhf.cli.help_page import help_page
from rrhf.cli.places import check_places
from rrhf.cli.terminal import print_once, print_repeats
from rrhf.commands import next_step
from rrhf.errors import EXIT_DONE, UserError
from rrhf.model_paths import require_models_as_written
from rrhf.process_end import launched_place

if TYPE_CHECKING:
    from rrhf.generation.config import GenerateConfig

PROG = "rrhf response-gen"
GENERATED = "generated.jsonl"
TRAIN_DATA = "train_data.json"

PROMPTS = "rm-static"
# As in the published script: 4 beams in 4 groups. Its temperature had no effect.
DIVERSE_BEAMS = {"do_sample": False, "num_beams": 4, "num_beam_groups": 4, "diversity_penalty": 1.0}
PLAIN_BEAMS = {"do_sample": False, "num_beams": 4}
LOCAL = "local"
# If any of these flags is given, or another engine, the published search is not used.
SEARCH_FLAGS = ("do_sample", "num_beams", "num_beam_groups", "diversity_penalty")


@dataclass
class ResponseGenConfig:
    """Sample responses to prompts, score them, and write OUTPUT_DIR/train_data.json."""

    model_name_or_path: str = field(
        metadata={"names": "engine's model", "positional": True, "aliases": ["base_model"]}
    )
    """The policy that writes the responses."""

    output_dir: str = field(
        metadata={"names": "output folder", "positional": True, "aliases": ["out_path"]}
    )
    """Folder for generated.jsonl and train_data.json, each with its manifest."""

    diverse_beam: bool = field(default=True, metadata={"positional": True})
    """Diverse beam search (4 beams in 4 groups, penalty 1.0), or plain beam search with 4 beams;
    do_sample, num_beams, num_beam_groups or diversity_penalty choose another search, and other
    engines than local sample."""


def main(argv: list[str]) -> int:
    from rrhf.generation.config import GenerateConfig
    from rrhf.scoring.config import ScoreConfig

    flags, chosen = chosen_flags(GenerateConfig, ScoreConfig, argv)
    if asks_for_help(argv):
        print_once(help_page(PROG, ResponseGenConfig, flags, asks_for_all(argv)))
        sys.exit(EXIT_DONE)
    own, generate, score = stage_values(flags, GenerateConfig, ScoreConfig, argv, chosen)
    # Both are built before the first stage starts, so that a mistake in the second shows at once.
    score_config = build(ScoreConfig, flags_of(ScoreConfig, chosen), score, PROG)
    generate_config = build(GenerateConfig, flags_of(GenerateConfig, chosen), generate, PROG)
    check_places(own)
    check_places(generate_config)
    check_places(score_config, made_later=("input_file",))
    require_models_as_written(score_config)
    if "bf16" not in generate and generate_config.engine == LOCAL:
        generate_config = _in_the_faster_format(generate_config)
    from rrhf.generation.stage import generate_file
    from rrhf.scoring.stage import score_file

    generate_file(generate_config, *launched_place())
    score_file(score_config, *launched_place())
    print_repeats()
    ranked = Path(own.output_dir) / TRAIN_DATA
    model = own.model_name_or_path if generate_config.engine_spec.has_model else "MODEL"
    words = ["--model_name_or_path", model, "--data_path", ranked]
    step = next_step("rrhf", "train", "rank", *words, "--output_dir", "RUN")
    print_once(f"Ranked candidates: {ranked}; `{step}` trains on them")
    return EXIT_DONE


def _in_the_faster_format(config: GenerateConfig) -> GenerateConfig:
    """Choose bfloat16 where sampling is faster in it, and say so."""
    from rrhf.models.precision import samples_faster_in_bfloat16

    if not samples_faster_in_bfloat16(config.model_name_or_path):
        return config
    print_once(
        "Responses are sampled in bfloat16, which is faster on this machine; --generate_bf16 false "
        "samples in float32"
    )
    return dataclasses.replace(config, bf16=True)


def chosen_flags(
    generate: type, score: type, argv: Sequence[str]
) -> tuple[dict[str, Flag], dict[str, str]]:
    """Return all flags, those of the chosen engine included, and the choices by field."""
    flags, files = all_flags(generate, score), ConfigFiles()
    chosen = {}
    with contextlib.suppress(*[UserError] if asks_for_help(argv) else []):
        for stage in (generate, score):
            for name in choices_of(stage).values():
                if value := look_up(flags[name], flags, argv, files):
                    chosen[name] = value
        flags = all_flags(generate, score, chosen)
    return flags, chosen


def all_flags(
    generate: type, score: type, chosen: Mapping[str, str] | None = None
) -> dict[str, Flag]:
    """Return the flags of both stages, except the flags that this command sets itself."""
    ours = flags_of(ResponseGenConfig)
    stages = {"generate": flags_of(generate, chosen), "score": flags_of(score, chosen)}
    stages["score"].pop("columns", None)  # applies to prompts; generated files have known names
    flags = dict(ours)
    for stage, found in stages.items():
        for name, flag in found.items():
            if name in ours or name in ("input_file", "output_file"):
                continue
            flags.setdefault(name, dataclasses.replace(flag, positional=False))
            if all(name in flags_of_one for flags_of_one in stages.values()):
                flags[f"{stage}_{name}"] = dataclasses.replace(
                    flag,
                    name=f"{stage}_{name}",
                    aliases=(),
                    positional=False,
                    help=f"As {name}, for `rrhf {stage}` alone.",
                )
    flags["prompts"] = dataclasses.replace(flags["prompts"], default=PROMPTS)
    if "columns" in flags:
        flags["columns"] = dataclasses.replace(flags["columns"], aliases=("generate_columns",))
    return flags


def stage_values(
    flags: Mapping[str, Flag],
    generate: type,
    score: type,
    argv: Sequence[str],
    chosen: Mapping[str, str] | None = None,
) -> tuple[ResponseGenConfig, dict[str, Any], dict[str, Any]]:
    """Parse the words into (this command's settings, generate's values, score's values)."""
    values = read_values(flags, argv, PROG)
    ours = flags_of(ResponseGenConfig)
    own = build(ResponseGenConfig, ours, {k: v for k, v in values.items() if k in ours}, PROG)
    search = DIVERSE_BEAMS if own.diverse_beam else PLAIN_BEAMS
    if any(name in values for name in SEARCH_FLAGS) or (chosen or {}).get("engine", LOCAL) != LOCAL:
        search = {}
    generated = str(Path(own.output_dir) / GENERATED)
    to_generate = {
        "prompts": PROMPTS,
        **search,
        **_share(values, "generate", flags_of(generate, chosen)),
    }
    to_generate |= {"model_name_or_path": own.model_name_or_path, "output_file": generated}
    to_score = _share(values, "score", flags_of(score, chosen))
    to_score.pop("columns", None)  # applies to prompts, as in `all_flags`
    to_score |= {
        "input_file": generated,
        "output_file": str(Path(own.output_dir) / TRAIN_DATA),
    }
    return own, to_generate, to_score


def _share(values: Mapping[str, Any], stage: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Return the values for one stage; `generate_bf16` overrides `bf16` for the stage
    "generate"."""
    shared = {name: value for name, value in values.items() if name in flags}
    own = {name: values[f"{stage}_{name}"] for name in flags if f"{stage}_{name}" in values}
    return shared | own
