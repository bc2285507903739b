"""`rrhf data validate|convert|stats`: parse, call, print; the work is in `rrhf.data`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from rrhf.cli.flags import parse_config
from rrhf.cli.menu import Menu
from rrhf.commands import next_step
from rrhf.data.columns import DataOptions
from rrhf.errors import EXIT_DONE, UserError

ACTIONS = {
    "validate": "check data files; report every mistake with file, line, field and fix",
    "convert": "convert or split a source: to candidates, preference rows or prompts",
    "stats": "measure a source: responses per prompt, ties, lengths, scores",
}


# Actions that people look for -> the command that does them.
_CONVERTS = "`rrhf data convert {} OUT.jsonl`"
SERVED = {
    **dict.fromkeys(("mix", "merge", "concat", "combine"), _CONVERTS.format("A.jsonl,B.jsonl:0.5")),
    **dict.fromkeys(("sample", "subset", "head"), _CONVERTS.format("FILE:1000/-1")),
    "split": "`rrhf data convert FILE OUT_DIR --parts '{train: 0.9, test: 0.1}'`",
    "rank": "`rrhf score FILE SCORED.jsonl --scorer REWARD_MODEL`",
    **dict.fromkeys(("check", "inspect", "show", "info"), "`rrhf data validate FILE`"),
}


@dataclass
class ValidateConfig(DataOptions):
    """Check data files: report how each is read, what it can be used for, and every mistake with
    its line and fix. Writes nothing."""

    file: list[str] = field(metadata={"names": "data", "positional": True, "aliases": ["data"]})
    """The files to check, in any supported format."""
    split: str | None = None
    """The split to check, if a folder or a named dataset is given."""


@dataclass
class StatsConfig(DataOptions):
    """Measure a data source: its rows, responses per prompt, ties, lengths and scores."""

    data: str = field(metadata={"names": "data", "positional": True})
    """The data to measure: a path, a registered name, package.module:name of your own function that
    yields rows, a hub name (owner/name), or a mixture of these."""
    split: str | None = None
    """The split of a named dataset; none = train, or the only split of the dataset."""
    json: bool = False
    """Print the figures as one JSON object."""
    seed: int = 0
    """Seed for drawing rows when the data gives a proportion, such as FILE:0.1."""


MENU = Menu(
    "rrhf data",
    "action",
    "Check, convert, split or measure data before they are used.",
    ACTIONS,
    ("", "`rrhf data ACTION --help` lists its arguments."),
)


def main(argv: list[str]) -> int:
    if MENU.is_shown(argv):
        return EXIT_DONE
    action, rest = argv[0], argv[1:]
    run = {"validate": validate, "convert": convert, "stats": stats}.get(action)
    if run is not None:
        return run(rest)
    if action in SERVED:
        raise UserError(f"rrhf data: there is no action {action!r}; {SERVED[action]} does that")
    raise MENU.unknown(action)


def validate(argv: list[str]) -> int:
    from rrhf.data.columns import parse_columns
    from rrhf.data.sources import SourceCounts, read_sets
    from rrhf.data.uses import count_uses, describe_uses

    config = parse_config(ValidateConfig, argv, "rrhf data validate")
    columns = parse_columns(config.columns)
    mistakes = []
    _require_whole_files(config.file)
    for path in config.file:
        counts = SourceCounts()
        try:
            sets = read_sets(path, config.split, counts, None, config.accept_edited_files, columns)
            uses = count_uses(sets)
        except UserError as error:
            mistakes.append(str(error))
            continue
        dropped = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items())
        if counts.kept == 0:
            mistakes.append(
                f"{path}: leaves no rows: all {counts.read} are left out ({dropped}); fix the "
                "rows, or name another source"
            )
            continue
        left_out = f"; left out: {dropped}" if dropped else ""
        print(f"{path}: good, {counts.kept} of {counts.read} rows{left_out}")
        for line in describe_uses(path, counts, uses, config.columns):
            print(f"  {line}")
    mistakes = mistakes or columns.never_seen(", ".join(config.file))
    if mistakes:
        raise UserError("\n".join(mistakes))
    return EXIT_DONE


def _require_whole_files(given: Sequence[str]) -> None:
    """Refuse a mixture of sources, because the check reads every row of each file.

    Raises:
        UserError: a mixture was given; the message ends with the command that checks its files.
    """
    from rrhf.data.mixing import SourceSpec, parse_mixture

    specs = [spec for one in given for spec in parse_mixture(one)]
    if specs != [SourceSpec(one) for one in given]:
        step = next_step("rrhf", "data", "validate", *(spec.path or spec.name for spec in specs))
        raise UserError(f"{' '.join(given)}: is a mixture, and whole files are checked: {step}")


def convert(argv: list[str]) -> int:
    from rrhf.cli.places import read_settings
    from rrhf.data.convert import ConvertConfig
    from rrhf.data.convert import convert as run

    for path, rows in run(read_settings(ConvertConfig, argv, "rrhf data convert")).items():
        print(f"{path}: {rows} rows")
    return EXIT_DONE


def stats(argv: list[str]) -> int:
    from rrhf.data.mixing import load_sets
    from rrhf.data.sources import SourceCounts
    from rrhf.data.stats import format_figures, measure_sets

    config = parse_config(StatsConfig, argv, "rrhf data stats")
    counts = SourceCounts()
    sets = load_sets(config.data, config.seed, config.split, counts, config)
    figures = {"rows_read": counts.read, "rows_left_out": dict(counts.dropped)}
    figures |= measure_sets(sets)
    print(json.dumps(figures, ensure_ascii=False) if config.json else format_figures(figures))
    return EXIT_DONE
