"""The settings of `rrhf compare`."""

from __future__ import annotations

from dataclasses import dataclass, field

from rrhf.evaluation.config import RESAMPLES
from rrhf.ranges import COUNT, check_ranges
from rrhf.seals import EditedFiles


@dataclass
class CompareConfig(EditedFiles):
    """Put evaluated rows into one table. With --world NAME it first trains every method on that
    world: see `rrhf compare --world help_desk --help`."""

    rows: list[str] = field(metadata={"names": "row", "positional": True})
    """Files that `rrhf evaluate` wrote, or folders with such files, in the order of the table."""

    output: str = field(default="", metadata={"names": "output file"})
    """Write the table as Markdown to this file; empty = only show it."""

    baseline: str = ""
    """Name of the row that the others' gains are measured from; empty = the row of the baseline
    that they were evaluated against, else of their reference policy, else the first of the files
    that are named."""

    columns: list[str] = field(default_factory=list)
    """Metrics to show, in order; empty = the usual ones. Costs (generation_seconds,
    serving_passes_per_response, training_seconds), weight_distance and parts of a gold preference
    (part_myth) have names too; the word all shows everything."""

    only_common_prompts: bool = False
    """Measure every row anew on the prompts that all rows have."""

    allow_mixed: bool = False
    """Show rows that were not made alike."""

    bootstrap_resamples: int = RESAMPLES
    """How often the prompts are resampled for an interval."""

    width: int = 120
    """Columns of the terminal; a wider table goes on below."""

    def __post_init__(self) -> None:
        check_ranges(self, {"bootstrap_resamples": COUNT, "width": COUNT})
