"""The settings of `rrhf compare`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from rrhf.evaluation.config import RESAMPLES
from rrhf.ranges import COUNT, Ranged
from rrhf.seals import EditedFiles


@dataclass
class CompareConfig(EditedFiles, Ranged):
    """Put rows that `rrhf evaluate` wrote into one table, with the gains over a baseline. With
    --world NAME it trains every method on that world and compares them: see
    `rrhf compare --world NAME --help`."""

    rows: list[str] = field(metadata={"names": "row", "positional": True})
    """Files that `rrhf evaluate` wrote, or folders with such files, in the order of the table."""

    output: str = field(default="", metadata={"names": "output file"})
    """Write the table as Markdown to this file; empty = only show it."""

    baseline: str = ""
    """Name of the row with which the others are compared in the table of gains; empty = the row of
    the baseline that the others were evaluated against, or else the row of their reference policy,
    or else the first file given."""

    columns: list[str] = field(default_factory=list)
    """Metrics to show, in order; empty = the default columns; all = everything. Costs
    (generation_seconds, serving_passes_per_response, training_seconds), weight_distance and parts
    of a gold preference (part_myth) can be named too."""

    over_seeds: bool = False
    """The rows are of several training seeds: show one row for each method, with intervals over
    seeds and prompts, and gains paired by seed. The seed is the number after "seed" in a row's name
    ("PPO seed 3"), or else in its path (runs/seed-3/rows)."""

    judge_calibration: str = field(default="", metadata={"names": "row"})
    """Also show win rates by the scorer (win_reward) corrected by its mistakes, which this row
    measured: a row of `rrhf evaluate` with --gold, or of `rrhf evaluate-reward`, with the same
    scorer."""

    only_common_prompts: bool = False
    """Restrict every row to the prompts that all rows have in common."""

    allow_mixed: bool = False
    """Put rows into one table even if they were not measured in the same way."""

    bootstrap_resamples: int = RESAMPLES
    """How often the prompts are resampled for an interval."""

    width: int = 120
    """Width of the terminal in characters; a wider table is split and continues below."""

    RANGES: ClassVar = {"bootstrap_resamples": COUNT, "width": COUNT}
