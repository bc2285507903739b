"""`rrhf compare`: puts evaluation rows into one table, with their gains over a baseline row.

Rows that were not measured in the same way (`rrhf.report.agreement`) are refused with a message
that lists the differences; `allow_mixed` shows them anyway.

Gains are paired: the same prompts are resampled for both rows, so that differences between prompts
cancel. The baseline row is the row of the baseline that the others were evaluated against, or else
the row of their reference policy (`base_of`), whatever the order of the files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.errors import UserError
from rrhf.evaluation.baseline import name_of_responses, policy_name, same_place
from rrhf.evaluation.bootstrap import CONFIDENCE, RESAMPLES, paired_difference
from rrhf.evaluation.results import is_row, load_row, measure_from_json, try_json
from rrhf.files import replaced_file
from rrhf.report.agreement import mixed, on_common_prompts
from rrhf.report.compare_seeds import (
    about_seeds,
    claims_over_seeds,
    gains_over_seeds,
    mixed_over_seeds,
    named_by_method,
    rows_over_seeds,
)
from rrhf.report.config import CompareConfig
from rrhf.report.corrected_wins import corrected_page, corrected_rows
from rrhf.report.judge_correction import Corrected
from rrhf.report.table import (
    FACT_COLUMNS,
    columns_of,
    default_columns,
    format_estimate,
    markdown_lines,
    markdown_table,
    notes_of,
    terminal_lines,
    terminal_table,
)

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A table of rows, with their gains over a baseline row.

    Attributes:
        rows: the rows in the order of the table.
        gains: row name -> metric -> {"mean", "low", "high", "n"}: the row minus the baseline row.
        baseline: name of the baseline row; "" if there are no gains.
        markdown: the whole page as Markdown.
        text: the same page for a terminal.
    """

    rows: list[Row]
    gains: dict[str, dict[str, dict[str, Any]]]
    baseline: str
    markdown: str
    text: str


def compare(config: CompareConfig) -> Comparison:
    """Read the rows, check them, and write the table.

    Raises:
        UserError: a file does not hold a row, two rows have the same name, or rows were not
            measured in the same way.
    """
    rows = read_rows(config.rows, config.accept_edited_files, config.over_seeds)
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("training_seed", 0), []).append(row)
    if config.only_common_prompts:
        groups = {s: on_common_prompts(g, config.bootstrap_resamples) for s, g in groups.items()}
    if config.over_seeds:
        differences, rows = mixed_over_seeds(groups), rows_over_seeds(groups)
    else:
        rows = groups.get(0, [])
        differences = mixed(rows)
    if differences and not config.allow_mixed:
        raise UserError(
            "these rows were not measured in the same way:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nevaluate them with the same settings (--only_common_prompts drops prompts "
            "that only some rows have), or show them anyway with --allow_mixed"
        )
    names_files = any(not Path(place).is_dir() for place in config.rows)
    base: str | None = config.baseline or base_of(rows)
    if base is None and names_files:
        base = rows[0]["name"]
    if not names_files:
        rows.sort(key=lambda row: row["name"] != base)  # the baseline first
    comparison = compare_rows(
        rows, base, config.columns, config.bootstrap_resamples, config.width, differences
    )
    if config.judge_calibration:
        calibration = load_row(config.judge_calibration, config.accept_edited_files)
        comparison = with_corrected(comparison, corrected_rows(rows, calibration), config.width)
    if config.output:
        with replaced_file(config.output) as file:
            file.write(comparison.markdown.encode("utf-8"))
        logger.info("table written to %s", config.output)
    return comparison


def compare_rows(
    rows: Sequence[Row],
    baseline: str | None = "",
    columns: Sequence[str] = (),
    resamples: int = RESAMPLES,
    width: int = 120,
    warnings: Sequence[str] = (),
) -> Comparison:
    """Compare rows that are in memory: their table, and their gains over a baseline row.

    Args:
        rows: rows as the evaluator returns them.
        baseline: name of the baseline row; empty = the first row; None = no gains.
        columns: the metrics to show; empty = `default_columns`.
        resamples: number of resamples of the paired bootstrap.
        width: width of the terminal in characters.
        warnings: differences between the rows, to be printed under the table.
    """
    if not rows:
        raise UserError("no rows to compare; name files or folders that `rrhf evaluate` wrote")
    shown = chosen_columns(rows, columns)
    name = rows[0]["name"] if baseline == "" else baseline
    found = [row for row in rows if row["name"] == name]
    names = ", ".join(repr(row["name"]) for row in rows)
    if name is not None and not found:
        raise UserError(f"baseline {name!r}: no row has this name; choose one of {names}")
    gains = {
        row["name"]: row_gains(row, base, resamples)
        for base in found
        for row in rows
        if row is not base
    }
    confidence = rows[0]["made_with"].get("confidence", CONFIDENCE)
    is_over_seeds = "by_seed" in rows[0]
    about = (
        about_seeds(rows[0], confidence)
        if is_over_seeds
        else f"{rows[0]['made_with']['num_prompts']} prompts; brackets: "
        f"{confidence:.0%} bootstrap intervals over prompts.\n"
    )
    notes = notes_of(rows) + "".join(f"Measured differently: {line}\n" for line in warnings)
    headings, lines = gain_cells(gains, rows)
    title = f"Gain on {name} (paired over {'seeds and ' * is_over_seeds}prompts)"
    pages = [(markdown_table(rows, shown), terminal_table(rows, shown, width)), (about, about)]
    if lines:
        table = terminal_lines(headings, lines, width)
        pages.append((f"{title}:\n\n{markdown_lines(headings, lines)}", f"{title}:\n{table}"))
    if lines and is_over_seeds:
        pages.append((claims_over_seeds(rows, found[0]),) * 2)
    if name is None and len(rows) > 1:
        notes += (
            f"No row is the baseline of the others; for gains, set --baseline to one of {names}\n"
        )
    if notes:
        pages.append(("".join(f"- {line}\n" for line in notes.splitlines()), notes))
    markdown, text = ("\n".join(parts) for parts in zip(*pages, strict=True))
    return Comparison(list(rows), gains, (name or "") if gains else "", markdown, text)


def with_corrected(
    comparison: Comparison, found: Mapping[str, Corrected], width: int
) -> Comparison:
    """Append corrected win rates to the page."""
    table = partial(terminal_lines, width=width)
    return replace(
        comparison,
        markdown=f"{comparison.markdown}\n{corrected_page(found, markdown_lines)}",
        text=f"{comparison.text}\n{corrected_page(found, table)}",
    )


def base_of(rows: Sequence[Row]) -> str | None:
    """Find the row that the others should be compared with; return its name, or None.

    This is the row of the baseline that the other rows were evaluated against, or else the row of
    their reference policy. A row is recognised by the model or file whose responses were measured,
    or else by its name. A sampled row is preferred to a greedy row.
    """
    baselines = [str(row.get("config", {}).get("baseline") or "") for row in rows]
    names = [str(row["made_with"].get("baseline") or "").partition("#")[0] for row in rows]
    references = [str(row["made_with"].get("reference") or "") for row in rows]
    for places, called in ((baselines, names), (references, references)):
        wanted = {policy_name(name) for name in called} | {name_of_responses(n) for n in called}
        for is_wanted in (
            lambda row, places=places: any(same_place(measured(row), p) for p in places),
            lambda row, wanted=wanted: row["name"].removesuffix(" greedy") in wanted - {""},
        ):
            found = [row for row in rows if is_wanted(row)]
            found.sort(key=lambda row: row["made_with"]["decoding"].get("kind") == "greedy")
            if found:
                return str(found[0]["name"])
    return None


def measured(row: Row) -> str:
    """Return the model or file whose responses were measured for a row.

    Returns "" if this is unknown, if the row is of best-of-N, or if only responses from one source
    of a file were measured.
    """
    config = row.get("config", {})
    if config.get("best_of_n", 1) > 1 or config.get("response_source"):
        return ""
    return str(config.get("model_name_or_path") or config.get("responses") or "")


def chosen_columns(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return the columns to show: the given columns, or the default columns if none are given.

    Raises:
        UserError: no row has a given column.
    """
    known = [*columns_of(rows), *FACT_COLUMNS]
    known += sorted({metric for row in rows for metric in row["metrics"]} - {*known, "kl_bound"})
    if list(columns) == ["all"]:
        return known
    for column in columns:
        if column not in known:
            raise UserError(f"column {column!r}: no row has it; choose from {', '.join(known)}")
    return list(columns) or default_columns(rows)


def row_gains(row: Row, baseline: Row, resamples: int = RESAMPLES) -> dict[str, dict[str, Any]]:
    """Compute gains (row minus baseline) of the metrics for which both rows have values by
    prompt."""
    if "by_seed" in row:
        return {m: found.as_dict() for m, found in gains_over_seeds(row, baseline).items()}
    confidence = row["made_with"].get("confidence", CONFIDENCE)
    gains = {}
    for metric, value in row["per_prompt"].items():
        if metric in baseline["per_prompt"]:
            ours = measure_from_json(value)
            theirs = measure_from_json(baseline["per_prompt"][metric])
            gains[metric] = paired_difference(ours, theirs, confidence, resamples).as_dict()
    return gains


def gain_cells(
    gains: Mapping[str, Mapping[str, Mapping[str, Any]]], rows: Sequence[Row]
) -> tuple[list[str], list[list[str]]]:
    """Return headings and cells of the table of gains; every number has a sign."""
    columns = {m: column for m, column in columns_of(rows).items() if column.shown and column.gain}
    metrics = [m for m in columns if any(m in row for row in gains.values())]
    headings = ["", *(f"Δ {columns[metric].heading}" for metric in metrics)]
    lines = [
        [name, *(format_estimate(row.get(m), columns[m].digits, True) for m in metrics)]
        for name, row in gains.items()
    ]
    return headings, lines if metrics else []


def read_rows(
    places: Sequence[str], accept_edited: bool = False, over_seeds: bool = False
) -> list[Row]:
    """Read rows from files and folders, in the given order.

    Args:
        places: files and folders.
        accept_edited: read rows even if they do not match their manifests.
        over_seeds: the rows are of several training seeds; each gets its method's name and its
            `training_seed`.

    Raises:
        UserError: a file does not hold a row, a folder holds no rows, two rows have the same name
            (and seed), or a row was changed after it was written.
    """
    rows: list[Row] = []
    seen: dict[tuple[str, int | None], Path] = {}
    for place in places:
        for path in _row_files(Path(place)):
            row = load_row(path, accept_edited)
            if over_seeds:
                row = named_by_method(row, path)
            key = row["name"], row.get("training_seed")
            if key in seen:
                of_seed = f" of seed {key[1]}" if over_seeds else ""
                fix = "" if over_seeds else ", or compare training seeds with --over_seeds"
                raise UserError(
                    f"{path}: the name of its row, {row['name']!r}{of_seed}, is also that of "
                    f"{seen[key]}; evaluate one of them under another --name{fix}"
                )
            seen[key] = path
            rows.append(row)
    return rows


def _row_files(place: Path) -> list[Path]:
    """Return the given file, or the row files of a folder in the order in which they were
    written."""
    if not place.is_dir():
        return [place]
    found = [path for path in place.glob("*.json") if is_row(try_json(path))]
    found += [path for path in _written_rows(place) if path not in found]
    if not found:
        raise UserError(f"{place}: holds no evaluated rows; make some with `rrhf evaluate`")
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))


def _written_rows(folder: Path) -> Iterator[Path]:
    """Yield the row files that the manifests in a folder name, unreadable files included.

    Raises:
        UserError: a row file that a manifest names is missing.
    """
    for place in sorted(folder.glob("*.manifest.json")):
        path = place.with_name(place.name.replace(".manifest.json", ".json"))
        known = try_json(place)
        if isinstance(known, dict) and known.get("file") == path.name and "row" in known:
            if not path.exists():
                raise UserError(
                    f"{path}: is missing, but {place.name} says that the row {known['row']!r} "
                    "was written; evaluate it again, or remove the manifest too"
                )
            yield path
