"""Find a source of data by its name and read its rows: files, known names, functions, the hub.

Each row is a dictionary and comes with its place; its columns decide how it is read
(`rrhf.data.formats`). `read_sets` yields records one at a time and counts what it leaves out. The
known names are one dictionary; `register_source` adds to it.

A source is looked up in this order: a file or folder of that path; a registered name or alias;
a function that the user wrote, `package.module:name` (`rrhf.data.own_source`); a dataset of the
hub, owner/name (or owner/name/folder for a folder of it).

Left out on purpose: proportions and mixtures (`rrhf.data.mixing`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rrhf.data.candidate_files import require_finished
from rrhf.data.candidate_rows import RowError
from rrhf.data.cells import TextCells, with_lists
from rrhf.data.columns import ColumnNames, near_hint
from rrhf.data.dataset_rows import dataset_rows
from rrhf.data.faults import Fault, Faults
from rrhf.data.formats import CANDIDATES, RowFormat, SourceCounts, find_format, read_row
from rrhf.data.ids import SeenIds
from rrhf.data.own_source import has_module, own_rows
from rrhf.data.row_files import DATA_SUFFIXES, Rows, path_rows
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.user_code import is_import_path

__all__ = ["REGISTRY", "SourceCounts", "known_names", "read_sets", "register_source"]

# (path of a local copy or None, split or None) -> rows
Reader = Callable[[str | None, str | None], Rows]


def _hub(hub_name: str, fixed_split: str | None = None, **options: Any) -> Reader:
    """Make a reader of one hub dataset, or of a local copy if a path is given."""

    def read(local_copy: str | None, split: str | None) -> Rows:
        split = fixed_split or split
        if local_copy is not None:
            return path_rows(local_copy, split)
        return dataset_rows(hub_name, split, hub_name, **options)

    return read


_hh = partial(_hub, "Anthropic/hh-rlhf")

REGISTRY: dict[str, Reader] = {
    "hh-rlhf/harmless-base": _hh(data_dir="harmless-base"),
    "hh-rlhf/helpful-base": _hh(data_dir="helpful-base"),
    "hh-rlhf/helpful-online": _hh(data_dir="helpful-online"),
    "hh-rlhf/helpful-rejection-sampled": _hh(data_dir="helpful-rejection-sampled"),
    "rm-static": _hub("Dahoas/rm-static"),
    "full-hh-rlhf": _hub("Dahoas/full-hh-rlhf"),
    "openai_summarize_comparisons": _hub("CarperAI/openai_summarize_comparisons"),
    "alpaca": _hub("tatsu-lab/alpaca"),
    "PKU-SafeRLHF/train": _hub("PKU-Alignment/PKU-SafeRLHF", "train"),
    "PKU-SafeRLHF/test": _hub("PKU-Alignment/PKU-SafeRLHF", "test"),
    "PKU-SafeRLHF-30K/train": _hub("PKU-Alignment/PKU-SafeRLHF-30K", "train"),
    "PKU-SafeRLHF-30K/test": _hub("PKU-Alignment/PKU-SafeRLHF-30K", "test"),
    "PKU-SafeRLHF-10K/train": _hub("PKU-Alignment/PKU-SafeRLHF-10K", "train"),
    "ultrafeedback": _hub("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"),
}

ALIASES: dict[str, str] = {
    "hh-harmless": "hh-rlhf/harmless-base",
    "hh-helpful": "hh-rlhf/helpful-base",
    "helpful_harmless": "full-hh-rlhf",
    "summarization": "openai_summarize_comparisons",
    "Dahoas/rm-static": "rm-static",
    "Dahoas/full-hh-rlhf": "full-hh-rlhf",
    "CarperAI/openai_summarize_comparisons": "openai_summarize_comparisons",
    "tatsu-lab/alpaca": "alpaca",
    "alpaca/train": "alpaca",
}


def register_source(name: str, reader: Reader, aliases: tuple[str, ...] = ()) -> None:
    """Add a source that commands and mixtures can name.

    Args:
        name: the source's name in commands.
        reader: (path of a local copy or None, split or None) -> an iterator of (place, row), where
            a row is a dictionary with the columns of any format.
        aliases: other names of the source.

    Raises:
        ValueError: one of the names is taken.
    """
    for new in (name, *aliases):
        if new in REGISTRY or new in ALIASES:
            raise ValueError(f"the source {new!r} is already registered; choose another name")
    REGISTRY[name] = reader
    ALIASES.update(dict.fromkeys(aliases, name))


def known_names() -> list[str]:
    """Return every registered name and alias."""
    return sorted((*REGISTRY, *ALIASES))


def _unknown(name: str) -> UserError:
    return UserError(
        f"{name!r} is neither a file nor a known source{near_hint(name, known_names(), 0.5)}; "
        f"known are {', '.join(known_names())}; a dataset of the hub is named owner/name, a "
        "function of your own package.module:name"
    )


def is_own(name: str) -> bool:
    """Whether a name is the import path of a user's own source, and not also a file or known
    name."""
    module = name.partition(":")[0]
    is_data = os.path.exists(module) or module.lower().endswith(DATA_SUFFIXES)
    return (
        is_import_path(name) and not is_data and module not in known_names() and has_module(module)
    )


def open_rows(name: str, path: str | None, split: str | None) -> tuple[str, Rows]:
    """Open a source; return the origin that is recorded in its records, and its rows.

    Raises:
        UserError: there is no such source.
    """
    if path is None and os.path.exists(name):
        if os.path.isfile(name):
            require_finished(name)
        return _origin_of_path(name), path_rows(name, split)
    registered = ALIASES.get(name, name)
    if registered in REGISTRY:
        return registered, REGISTRY[registered](path, split)
    if is_own(name):
        return name, own_rows(name, path, split)
    if path is not None:
        return name, path_rows(path, split)
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or name.lower().endswith(DATA_SUFFIXES):
        raise UserError(f"{name}: there is no such file or folder; check the path")
    if len(parts) < 2 or not all(parts):
        raise _unknown(name)
    options = {"data_dir": "/".join(parts[2:])} if len(parts) > 2 else {}
    return name, _hub_rows(name, "/".join(parts[:2]), split, options)


def _hub_rows(name: str, hub_name: str, split: str | None, options: dict[str, Any]) -> Rows:
    """Read rows from the hub; if this fails, the message also names the most similar registered
    source."""
    try:
        yield from dataset_rows(hub_name, split, name, **options)
    except UserError as error:
        raise UserError(f"{error}{near_hint(name, known_names(), 0.7)}") from error


def _origin_of_path(path: str) -> str:
    name = Path(path).name
    for suffix in (".gz", ".jsonl", ".json"):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


def read_sets(
    spec: str,
    split: str | None = None,
    counts: SourceCounts | None = None,
    path: str | None = None,
    accept_edited: bool = False,
    columns: ColumnNames | None = None,
) -> Iterator[CandidateSet]:
    """Yield the records of a source one at a time, each with a unique id and its origin.

    Args:
        spec: a path, a registered name, `package.module:name`, or a dataset of the hub.
        split: the split of a dataset; None = "train", or the only split.
        counts: updated while reading.
        path: a local copy of the named source.
        accept_edited: read a file even if it does not match its manifest.
        columns: the user's mapping of column names.

    Raises:
        UserError: there is no such source, it is empty, unfinished or changed since it was written,
            or some rows are faulty (up to 20 are reported together; sets before the first of them
            have been yielded by then).
    """
    counts = SourceCounts() if counts is None else counts
    origin, rows = open_rows(spec, path, split)
    row_format: RowFormat | None = None
    faults = Faults(accept_edited)
    ids = SeenIds()
    seen_any = False
    for where, row in rows:
        seen_any = True
        if isinstance(row, Fault):
            faults.add_fault(where, row)
        else:
            is_table = isinstance(row, TextCells)
            if columns and isinstance(row, Mapping):
                row = columns.rename(row, where)
            try:
                if isinstance(row, Mapping):
                    row = with_lists(row, where, is_table)
                row_format = row_format or find_format(row, where)
                found = read_row(row_format, row, where, counts, path or spec)
            except RowError as error:
                for text in error.faults:
                    faults.add(text)
            else:
                if found is not None and not faults:
                    yield _marked(ids.give(found), origin, row_format)
        if faults.is_full:
            break
    faults.raise_if_any()
    if not seen_any:
        raise UserError(f"{path or spec}: holds no rows; make it again, or name another source")


def _marked(found: CandidateSet, origin: str, row_format: RowFormat) -> CandidateSet:
    """Add the origin to a set, unless the set has one or comes from a candidate file."""
    if found.origin or row_format.name == CANDIDATES:
        return found
    return CandidateSet(found.id, found.query, found.messages, found.candidates, origin)
