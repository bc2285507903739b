"""Convert any data source to a file of candidate rows, TRL's preference rows, or prompts.

With `parts`, the rows are split by first human turn and each part is written to a separate file.
A file is written completely or not at all. Each file gets a manifest with the counts of rows kept
and dropped, the reasons for dropping rows, and the hashes of the local source files.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rrhf.data.candidate_files import replaced_rows, write_candidate_sets
from rrhf.data.columns import DataOptions
from rrhf.data.formats import SourceCounts
from rrhf.data.jsonl import encode_row
from rrhf.data.mixing import load_sets, parse_mixture, require_not_read
from rrhf.data.row_files import DATA_SUFFIXES, JSON_SUFFIXES
from rrhf.data.sources import is_own
from rrhf.data.views import Sets, pairs, prompts, split_by_first_turn
from rrhf.errors import UserError
from rrhf.files import sha256_file
from rrhf.manifests import COMPLETE, require_own_manifest_place, write_manifest
from rrhf.os_errors import explained_os_errors
from rrhf.progress import tracked
from rrhf.records import CandidateSet
from rrhf.seals import seal
from rrhf.user_code import source_file

_PART_NAME = re.compile(r"[\w+-](?:[\w .+-]{0,98}[\w+-])?")

Form = Literal["candidates", "preference", "prompts"]


@dataclass
class ConvertConfig(DataOptions):
    """Convert a data source to a candidate file, preference rows or prompts; with --parts, split it
    so that rows with the same first human turn stay together."""

    data: str = field(metadata={"names": "data", "positional": True})
    """The data source: a path, a known name, package.module:name for your own function that yields
    rows, owner/name for a dataset of the hub, or a mixture of these (name[:proportion[:path]],
    separated by commas)."""
    output: str = field(metadata={"names": "output", "positional": True})
    """The file to write; with --parts, the folder in which to write one file per part."""
    to: Form = "candidates"
    """The form of the rows. candidates: RRHF's columns query, responses, scores; preference: TRL's
    columns prompt, chosen, rejected; prompts: only the column prompt, each prompt once."""
    split: str | None = None
    """The split of a named dataset; none = train, or the only split of the dataset."""
    parts: dict[str, float] | None = None
    """Split by first human turn into parts with these shares, such as
    '{reward: 0.4, policy: 0.4, heldout: 0.2}'."""
    new_ids: bool = False
    """Replace all ids with new ones made from the prompts, for instance after joining files by
    hand."""
    seed: int = 0
    """Random seed for drawing the rows of a proportion, and for the split by --parts."""

    def __post_init__(self) -> None:
        if self.parts is not None:
            self._check_parts(self.parts)
        for path in self.files():
            require_not_read(path, self.data, "output")
        kind = Path(self.output.lower().removesuffix(".gz")).suffix
        if not self.parts and kind in DATA_SUFFIXES and kind not in JSON_SUFFIXES:
            raise UserError(
                f"output {self.output}: would hold JSON lines, but its name ends in {kind}; "
                "choose a name that ends in .jsonl or .jsonl.gz"
            )

    def _check_parts(self, parts: dict[str, float]) -> None:
        if not parts:
            raise UserError(
                "--parts: names no part; write '{train: 0.9, test: 0.1}', or leave it out"
            )
        for name, share in parts.items():
            if isinstance(name, bool) or not _PART_NAME.fullmatch(str(name)):
                raise UserError(
                    f"--parts: {name!r} cannot name a part, because the name becomes a file "
                    "name; use letters, digits, blanks, -, _, + and, between them, dots; put the "
                    "names yes, no, true and false in quotes"
                )
            is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
            if not is_number or not 0 < share <= 1:
                raise UserError(
                    f"--parts: {name}: {share!r} is not a share; use a number above 0 and at most "
                    "1, or leave the part out"
                )
        if (total := math.fsum(parts.values())) > 1 + 1e-9:
            raise UserError(
                f"--parts: the shares add up to {total:g}; give shares that add up to at most 1"
            )

    def files(self) -> list[str]:
        """Return the files to write: the output, or one for each part."""
        if not self.parts:
            return [self.output]
        return [str(Path(self.output) / f"{name}.jsonl") for name in self.parts]


def convert(config: ConvertConfig) -> dict[str, int]:
    """Convert a source; return the number of rows written to each file.

    Raises:
        UserError: the data cannot be read, or a file would get no rows; no file is changed.
    """
    counts = SourceCounts()
    sets = load_sets(config.data, config.seed, config.split, counts, config, new_ids=config.new_ids)
    parts: list[Sets] = [sets]
    if config.parts:
        parts = list(split_by_first_turn(sets, config.parts, config.seed).values())
    outputs = {
        path: _view(config, path, part) for path, part in zip(config.files(), parts, strict=True)
    }
    if config.parts:
        with explained_os_errors(config.output):
            os.makedirs(config.output, exist_ok=True)
    for path in outputs:
        require_own_manifest_place(path)
    manifest = {
        "made_by": "rrhf data convert",
        "data": config.data,
        "split": config.split,
        "parts": config.parts,
        "seed": config.seed,
        "input_sha256": _input_hashes(config.data),
        "source_counts": counts.as_dict(),
    }
    written = {}
    for path, (chosen, view_counts) in outputs.items():
        shown = tracked(chosen, "convert", "row")
        if config.to == "candidates":
            written[path] = int(write_candidate_sets(path, shown, manifest)["rows"])
            continue
        as_row = preference_row if config.to == "preference" else prompt_row
        about = {**manifest, "view_counts": view_counts.as_dict()}
        written[path] = _write_rows(path, [as_row(item) for item in shown], about)
    return written


def _input_hashes(data: str) -> dict[str, str]:
    found = {}
    for spec in parse_mixture(data):
        for place in (spec.path or spec.name, is_own(spec.name) and source_file(spec.name)):
            if place and os.path.isfile(place):
                found[place] = sha256_file(place)
    return found


def _view(config: ConvertConfig, path: str, sets: Sets) -> tuple[Sets, SourceCounts]:
    """Choose the sets to write to a file, and count the sets that are left out.

    Raises:
        UserError: there is no set to write.
    """
    counts = SourceCounts()
    if not sets:
        raise UserError(
            f"{path}: no row falls into this part; give it a larger share, or use more data or "
            "another --seed"
        )
    if config.to == "preference":
        sets = pairs(sets, counts)
    elif config.to == "prompts":
        sets = prompts(sets, counts=counts)
    if not sets:
        why = ", ".join(f"{number} {reason}" for reason, number in counts.dropped.items())
        raise UserError(
            f"{path}: no row could be written as {config.to} ({why}); choose "
            "another form, or other data"
        )
    return sets, counts


def preference_row(pair: CandidateSet) -> dict[str, Any]:
    """Turn a pair into a row of TRL: conversations if the set has messages, else texts."""
    replies: list[Any] = list(pair.responses)
    if not _is_text(pair):
        replies = [[{"role": "assistant", "content": text}] for text in replies]
    return {**prompt_row(pair), "chosen": replies[0], "rejected": replies[1]}


def prompt_row(item: CandidateSet) -> dict[str, Any]:
    """Turn a prompt into a row of TRL: a conversation if the set has messages, else a text."""
    return {"prompt": item.query if _is_text(item) else item.conversation}


def _is_text(item: CandidateSet) -> bool:
    return item.messages is None or item.is_plain


def _write_rows(path: str, rows: Sequence[dict[str, Any]], manifest: dict[str, Any]) -> int:
    with replaced_rows(path) as (sink, digest):
        sink.writelines(map(encode_row, rows))
    sealed = seal(digest, len(rows))
    write_manifest(path, {"status": COMPLETE, **manifest, **sealed})
    return len(rows)
