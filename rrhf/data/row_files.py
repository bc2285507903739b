"""Read the rows of a file or a folder, each with its place.

JSON lines or arrays, tables and texts are read here (`rrhf.data.tables`, `rrhf.data.json_scan`);
parquet, arrow and any other files of a folder are left to the `datasets` library.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rrhf.data.candidate_files import require_finished
from rrhf.data.compressed_files import require_plain_input
from rrhf.data.dataset_rows import DEFAULT_SPLIT, dataset_rows
from rrhf.data.faults import Edited, Fault
from rrhf.data.json_scan import scan_rows
from rrhf.data.tables import (
    SEPARATORS,
    TEXT_SUFFIX,
    kind_of_file,
    looks_like_json,
    table_rows,
    text_rows,
)
from rrhf.errors import UserError
from rrhf.files import file_digest
from rrhf.seals import seal_difference

logger = logging.getLogger(__name__)

# Pairs of a place and a row; a Fault in place of a row that cannot be read.
Rows = Iterator[tuple[str, Any]]

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_TABLE_KINDS = {".parquet": "parquet", ".arrow": "arrow"}
DATA_SUFFIXES = (*JSON_SUFFIXES, *_TABLE_KINDS, *SEPARATORS, TEXT_SUFFIX)


def path_rows(path: str, split: str | None) -> Rows:
    """Read the rows of a file, or of a split in a folder.

    Raises:
        UserError: there is nothing at the path, or it is a pipe or a device.
    """
    if os.path.isdir(path):
        return _folder_rows(path, split)
    if not os.path.exists(path):
        raise UserError(f"{path}: there is no such file or folder; check the path")
    require_plain_input(path)
    kind = _TABLE_KINDS.get(Path(path).suffix.lower())
    if kind is not None:
        return dataset_rows(kind, DEFAULT_SPLIT, path, data_files=path)
    return _file_rows(path)


def _folder_rows(path: str, split: str | None) -> Rows:
    """Read a folder: the file `<split>.jsonl` or similar, as in HH; else through `datasets`."""
    stem = split or DEFAULT_SPLIT
    names = sorted(os.listdir(path), reverse=True)  # if only case differs, prefer lower case
    for suffix in (*JSON_SUFFIXES, *SEPARATORS, TEXT_SUFFIX):
        for name in names:
            file = os.path.join(path, name)
            if (
                name.startswith(stem)
                and name[len(stem) :].lower() == suffix
                and os.path.isfile(file)
            ):
                if split is None:
                    logger.info("%s: reading %s", path, name)
                return _file_rows(file)
    return dataset_rows(path, split, path)


def _file_rows(path: str) -> Rows:
    kind = kind_of_file(path)
    if kind is not None:
        # `rrhf data convert` writes JSON lines, with a manifest, under any name.
        manifest = require_finished(path)
        difference = manifest and seal_difference(path, manifest, file_digest(path))
        if difference:
            yield path, Edited(0, difference)
    if kind in SEPARATORS:
        for line, row in table_rows(path, SEPARATORS[kind]):
            yield f"{path}:{line}", row
    elif kind == TEXT_SUFFIX and not looks_like_json(path):
        for line, prompt in text_rows(path):
            if prompt is not None:
                yield f"{path}:{line}", prompt
    else:
        for item in scan_rows(path, require_finished(path)):
            if isinstance(item, Fault):
                yield item.place_in(path), item
            else:
                yield f"{path}:{item.line}", item.value
