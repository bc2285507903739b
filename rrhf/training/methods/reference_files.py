"""Finds and reads the files of reference log-probs that `kept_reference` makes.

A file holds the log-probs of all response tokens of some examples, in the order of the examples, as
float32 numbers (little-endian) and nothing else. Where a response begins follows from the number of
tokens of the responses before it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np
import torch

from rrhf.data.collate import EncodedSet
from rrhf.data.mixing import parse_mixture
from rrhf.files import file_digest, json_object
from rrhf.manifests import COMPLETE, manifest_path, read_manifest
from rrhf.seals import seal_difference
from rrhf.training.core.streams import EncodedExamples

logger = logging.getLogger(__name__)

NUMBER = "<f4"
"""numpy's name of the type of a file's numbers."""

FOLDER = ".reference_logprobs"
"""The folder next to data files; hidden, so that programs which read all data there skip it."""

_PLURALS = {"policy": "policies", "examples": "examples", "precision": "precisions"}


def folder_of(source: str, run: Path) -> Path:
    """Return the folder for log-probs: next to the first file that `source` names.

    If `source` names no file, or no folder can be made next to it, the folder is in the run folder.

    Args:
        source: the data, as the user named it.
        run: the run folder.
    """
    for part in parse_mixture(source):
        path = Path(part.path or part.name).expanduser()
        folder = path.parent / FOLDER / path.name
        if path.exists() and (folder.is_dir() or os.access(path.parent, os.W_OK)):
            return folder
    return run / FOLDER


def is_whole(file: Path) -> bool:
    """Whether a file is complete; a damaged file is removed, with a warning."""
    manifest = read_manifest(file)
    if manifest is None or manifest["status"] != COMPLETE:
        return False
    difference: str | None = "is missing"
    if file.exists():
        difference = seal_difference(file, manifest, file_digest(file))
    if difference is None:
        return True
    logger.warning("%s: %s; computing it again", file, difference)
    file.unlink(missing_ok=True)
    manifest_path(file).unlink()
    return False


def describe_others(folder: Path, settings: Mapping[str, str]) -> str:
    """Say in which settings the files of a folder differ from the wanted file.

    Args:
        folder: the folder, which need not exist.
        settings: the settings of the wanted file.

    Returns:
        words for a log line; "" if the folder holds no other file.
    """
    found = []
    for place in folder.glob("*.manifest.json"):
        others = (json_object(place) or {}).get("settings", {})
        if differing := [name for name in settings if others.get(name) != settings[name]]:
            found.append(differing)
    if not found:
        return ""
    closest = min(found, key=len)
    return f"; those there are of other {' and '.join(_PLURALS[name] for name in closest)}"


class WithReference(Sequence[EncodedSet]):
    """Examples to which the log-probs of a file are added.

    Args:
        examples: all examples.
        indices: indices of the examples whose log-probs are in the file, ascending; the other
            examples stay without log-probs.
        counts: number of response tokens of each example at `indices`.
        file: the file of log-probs.

    Attributes:
        lengths, sizes, identity: those of `examples`.
    """

    def __init__(
        self,
        examples: EncodedExamples,
        indices: Sequence[int],
        counts: Sequence[int],
        file: Path,
    ) -> None:
        self._examples = examples
        self._indices, self._ends = np.asarray(indices), np.cumsum([0, *counts])
        self._numbers = np.memmap(file, NUMBER, "r", shape=(int(self._ends[-1]),))
        self.lengths, self.sizes = examples.lengths, examples.sizes
        self.identity = examples.identity

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> EncodedSet: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedSet]: ...
    def __getitem__(self, index: int | slice) -> EncodedSet | list[EncodedSet]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        example = self._examples[index]
        place = int(np.searchsorted(self._indices, index))
        if place == len(self._indices) or self._indices[place] != index:
            return example
        numbers = torch.tensor(self._numbers[self._ends[place] : self._ends[place + 1]])
        lengths = [len(ids) for ids in example.response_ids]
        return replace(example, reference_logprobs=numbers.split(lengths))
