"""Mix several sources, each in its own proportion, into one sequence; a seed decides the draws.

A mixture is one or several parts `name[:proportion[:path]]`, separated by commas. A name is any
source of `rrhf.data.sources`; the path of an existing file may contain colons and commas. The
proportion is

- a number or a fraction `a/b`: this share of the source, drawn without replacement. Above 1, the
  source is copied whole, and only the remainder is drawn: with `2.5`, every row is used twice, and
  half of the rows once more. `0` skips the source;
- `n/-1` or `-n`: exactly n rows. If the source has fewer rows, it is first copied whole.

Rows keep the order of their source, and one source follows the other; shuffling is left to
training. Rows are not held in memory: a candidate file is read by index, any other source is
spooled to a temporary file.

Left out on purpose: proportions that change during training.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from rrhf.data.candidate_files import CandidateFile
from rrhf.data.columns import ColumnNames, DataOptions, parse_columns
from rrhf.data.faults import Fault
from rrhf.data.formats import (
    CANDIDATE_COLUMNS,
    CANDIDATES,
    SourceCounts,
    is_candidate_row,
)
from rrhf.data.ids import SeenIds
from rrhf.data.indexed_sets import IndexedSets
from rrhf.data.json_scan import scan_rows
from rrhf.data.row_files import JSON_SUFFIXES
from rrhf.data.sources import is_own, open_rows, read_sets
from rrhf.errors import UserError
from rrhf.files import is_same_file
from rrhf.records import CandidateSet, set_id
from rrhf.user_code import is_import_path

logger = logging.getLogger(__name__)

MOST_ROWS = 10**8
"""Largest number of rows that are made from a smaller source by repeating its rows."""

_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_PROPORTION = re.compile(rf"({_NUMBER})(?:/({_NUMBER}))?")


@dataclass(frozen=True)
class SourceSpec:
    """One part of a mixture.

    Attributes:
        name: a path, a registered name, `package.module:name`, or a dataset of the hub.
        proportion: share of the source's rows, 0 or more; None if `count` is given.
        count: exact number of rows; None if `proportion` is given.
        path: a local copy of the named source.
    """

    name: str
    proportion: Fraction | None = Fraction(1)
    count: int | None = None
    path: str | None = None

    @property
    def is_skipped(self) -> bool:
        """Whether no row of the source is used; then the source need not exist."""
        return self.count == 0 or self.proportion == 0

    def number_of_rows(self, size: int) -> int:
        """Return how many rows are used if the source has `size` rows."""
        if self.count is not None:
            return self.count
        assert self.proportion is not None, "a part has a proportion or a count"
        return round(size * self.proportion)


def parse_mixture(specs: str | Sequence[str]) -> list[SourceSpec]:
    """Parse a mixture, or join the parts of several mixtures.

    Raises:
        UserError: no source is named, or a proportion is invalid.
    """
    parts: list[SourceSpec] = []
    for text in [specs] if isinstance(specs, str) else specs:
        if os.path.exists(text):
            parts.append(SourceSpec(text))
            continue
        parts.extend(_parse_part(part.strip()) for part in text.split(",") if part.strip())
    if not parts:
        raise UserError(
            "no data named; write a path or name[:proportion[:path]], several separated by commas"
        )
    return parts


def require_not_read(output: str, specs: str, name: str = "output_file") -> None:
    """Refuse an output that is one of the input files, however its path is written.

    A mixture that cannot be parsed is not reported here.

    Args:
        output: the file that is to be written.
        specs: the mixture.
        name: the setting that gives the output.

    Raises:
        UserError: the output is an input file.
    """
    try:
        parts = parse_mixture(specs)
    except UserError:
        return
    for spec in parts:
        place = os.path.expanduser(spec.path or spec.name)
        if os.path.isfile(place) and is_same_file(place, output):
            raise UserError(f"{name} {output}: is also an input file; choose another output")


def _parse_part(text: str) -> SourceSpec:
    if os.path.exists(text):
        return SourceSpec(text)
    name, _, rest = text.partition(":")
    proportion, _, path = rest.partition(":")
    as_function = f"{name}:{proportion}"
    if is_own(as_function):
        name = as_function
        proportion, _, path = path.partition(":")
    if not name:
        raise UserError(f"{text!r}: names no source; write name[:proportion[:path]]")
    spec = SourceSpec(name, path=path or None)
    if not proportion:
        return spec
    match = _PROPORTION.fullmatch(proportion)
    if match is None:
        own = f"; there is no module {name!r} here, for a function of your own start in its folder"
        raise UserError(
            f"{text!r}: {proportion!r} is not a proportion; write a number (0.5), a fraction "
            f"(1/3), or a count (1000/-1){own if is_import_path(as_function) else ''}"
        )
    above, below = Fraction(match.group(1)), Fraction(match.group(2) or "1")
    if below == 0:
        raise UserError(f"{text!r}: {proportion!r} divides by zero; fix the proportion")
    value = above / below
    if value >= 0:
        return replace(spec, proportion=value)
    if value.denominator != 1:
        raise UserError(
            f"{text!r}: {proportion!r} is negative, so it is a count and must be a whole number"
        )
    return replace(spec, proportion=None, count=int(-value))


def check_sources(specs: str | Sequence[str], split: str | None = None) -> None:
    """Check that the sources of a mixture exist, without reading them or asking the hub.

    Raises:
        UserError: there is no such source, or a proportion is invalid.
    """
    for spec in parse_mixture(specs):
        if not spec.is_skipped:
            open_rows(spec.name, spec.path, split)


def choose_rows(size: int, wanted: int, seed: str) -> list[int]:
    """Choose `wanted` of `size` rows: whole copies first, then a draw without replacement.

    Returns:
        The indices of the rows, ascending within each copy and within the draw.

    Raises:
        UserError: the source has no rows, but `wanted` is not 0.
    """
    if wanted == 0:
        return []
    if size == 0:
        raise UserError(
            f"{wanted} rows are wanted from a source that has no rows; name another source"
        )
    copies, rest = divmod(wanted, size)
    drawn = sorted(random.Random(seed).sample(range(size), rest))
    return list(range(size)) * copies + drawn


class Mixture(IndexedSets):
    """Chosen rows of several files as one sequence; each repeat of a row gets its own id.

    Attributes:
        digest: a hash of the files and of the choice of rows.
    """

    def __init__(self, parts: Sequence[CandidateFile], rows: Sequence[Sequence[int]]) -> None:
        """Make the sequence.

        Args:
            parts: the files.
            rows: for each file, the indices of the rows to use, in order.
        """
        self._parts = parts
        self._part = array("L")
        self._row = array("Q")
        for number, chosen in enumerate(rows):
            self._part.extend([number] * len(chosen))
            self._row.extend(chosen)
        digest = hashlib.sha256(" ".join(part.digest for part in parts).encode())
        digest.update(self._part)
        digest.update(self._row)
        self.digest = digest.hexdigest()
        self._own_ids: dict[int, str] = {}
        if len(parts) > 1 or any(len(set(chosen)) < len(chosen) for chosen in rows):
            self._tell_ids_apart()

    def _tell_ids_apart(self) -> None:
        ids = SeenIds()
        for number in range(len(self)):
            found = self[number]
            fresh = ids.give(found)
            if fresh.id != found.id:
                self._own_ids[number] = fresh.id

    def __len__(self) -> int:
        return len(self._row)

    def _at(self, number: int) -> CandidateSet:
        found = self._parts[self._part[number]][self._row[number]]
        own_id = self._own_ids.get(number)
        return found if own_id is None else replace(found, id=own_id)


def load_sets(
    specs: str | Sequence[str],
    seed: int = 0,
    split: str | None = None,
    counts: SourceCounts | None = None,
    options: DataOptions | None = None,
    *,
    new_ids: bool = False,
) -> CandidateFile | Mixture:
    """Load a mixture as records by index; everything is checked before this returns.

    Args:
        specs: `name[:proportion[:path]]`, several separated by commas, or a list of such texts.
        seed: decides which rows are drawn if a proportion is not a whole number. split: the split
        of named datasets. counts: receives the numbers of rows read and dropped. options: whether
        changed files are read, the names of columns, and whether a missing column is only warned
        of. new_ids: ignore the ids in candidate files and make new ones from the prompts.

    Raises:
        UserError: in the cases of `rrhf.data.sources.read_sets`, if no row has a column that
            `columns` names, or if no rows are left.
    """
    counts = SourceCounts() if counts is None else counts
    options = options or DataOptions()
    names = parse_columns(options.columns)
    parts: list[CandidateFile] = []
    rows: list[Sequence[int]] = []
    for position, spec in enumerate(parse_mixture(specs)):
        if spec.is_skipped:
            logger.info("%s: skipped, its proportion is 0", spec.name)
            continue
        part = _open_part(spec, split, counts, new_ids, options.accept_edited_files, names)
        parts.append(part)
        wanted = spec.number_of_rows(len(part))
        if wanted > max(len(part), MOST_ROWS):
            raise UserError(
                f"{spec.name}: {wanted:,} rows are wanted from a source that has {len(part):,}; "
                f"at most {MOST_ROWS:,} are made by copying, so lower its proportion"
            )
        is_whole = wanted == len(part)
        # Not by the name: a file that was moved gives the same rows.
        draw = f"{seed}/{position}"
        rows.append(range(wanted) if is_whole else choose_rows(len(part), wanted, draw))
    for told in names.never_seen(str(specs)) if parts else ():
        if not options.columns_may_miss:
            raise UserError(told)
        logger.warning("%s", told)
    if not any(rows):
        raise UserError(f"{specs}: no rows are left; fix the proportions, or name another source")
    if len(parts) == 1 and rows[0] == range(len(parts[0])):
        return parts[0]
    return Mixture(parts, rows)


def _open_part(
    spec: SourceSpec,
    split: str | None,
    counts: SourceCounts,
    new_ids: bool,
    accept_edited: bool,
    names: ColumnNames,
) -> CandidateFile:
    place = spec.path or spec.name
    file = None
    if not new_ids and not names:
        if os.path.isfile(place):
            file = CandidateFile.as_written(place)
        if file is None and _first_candidate_row(place) is not None:
            file = CandidateFile(place, accept_edited)
    if file is not None:
        counts.read += len(file)
        counts.kept += len(file)
        counts.formats[CANDIDATES] += len(file)
        counts.name_unread(place, [x for x in file.columns if x not in CANDIDATE_COLUMNS])
        return file
    sets = read_sets(spec.name, split, counts, spec.path, accept_edited, names)
    if new_ids:
        sets = (replace(found, id=set_id(found.query, found.messages)) for found in sets)
    return CandidateFile.spool(sets, spec.name)


def _first_candidate_row(path: str) -> dict[str, Any] | None:
    """Read the first readable row of a candidate file; None for any other file."""
    if not os.path.isfile(path) or not path.lower().endswith(JSON_SUFFIXES):
        return None
    for item in scan_rows(path):
        if not isinstance(item, Fault):
            return item.value if is_candidate_row(item.value) else None
    return None
