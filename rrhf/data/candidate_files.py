"""Read and write candidate files: prompts, responses and scores, one JSON object per line.

    {"query": "...", "responses": ["...", "..."], "scores": [0.3, -1.2]}

This is the format that RRHF publishes and reads. Such files are read unchanged, as JSON lines or as
one JSON array. A row may also have `messages` (the conversation behind the query), `id`, `origin`,
and, with one entry per response, `sources` and `finish_reasons`; unknown keys are ignored. Scores
may be missing or null for responses that have not been scored yet.

Up to 20 mistakes in a file are reported in one message, each with file, line, field and fix. These
are not mistakes: an empty response, equal scores, a single response, and rows with different
numbers of responses.

Left out on purpose: other names of columns (`rrhf.data.sources`), and how training uses the rows
(`rrhf.data.views`).
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, cast, overload

from rrhf.data.candidate_rows import RowError, candidate_set_to_row, parse_candidate_set
from rrhf.data.compressed_files import READ_BYTES, UNREADABLE, is_compressed, open_bytes
from rrhf.data.faults import Fault, Faults
from rrhf.data.ids import SeenIds
from rrhf.data.indexed_sets import IndexedSets
from rrhf.data.json_scan import Row, scan_rows
from rrhf.data.jsonl import decode_rows, encode_row
from rrhf.errors import UserError
from rrhf.files import Digest, replaced_file
from rrhf.manifests import COMPLETE, forget_manifest, manifest_path, read_manifest, write_manifest
from rrhf.os_errors import PathLike, explained_os_errors
from rrhf.records import CandidateSet
from rrhf.seals import seal_difference

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 64  # rows per read when the rows are read in order
_BLOCK_BYTES = 1 << 20


def require_finished(path: PathLike) -> dict[str, Any] | None:
    """Return the manifest of an input file, or None if it has none; refuse an unfinished file.

    Raises:
        UserError: the manifest says that the file is unfinished.
    """
    manifest = read_manifest(path)
    if manifest is not None and manifest.get("status") != COMPLETE:
        raise UserError(
            f"{path}: its manifest ({manifest_path(path).name}) says "
            f"{manifest.get('status')!r}: the stage that writes this file has not ended; run it "
            "again to finish it, or remove the manifest to use the rows written so far"
        )
    return manifest


def _scan_sets(
    path: PathLike, accept_edited: bool, digest: Digest | None = None
) -> Iterator[tuple[Row, CandidateSet, str]]:
    """Read and check a candidate file row by row.

    After the first fault, the rest of the file is only searched for further faults.

    Yields:
        The row, its set with an id that is unique in the file, and the set's id before repeated
        ids were numbered.

    Raises:
        UserError: at the end, with up to 20 faults; at once if the file cannot be opened or is
            unfinished.
    """
    manifest = require_finished(path)
    faults = Faults(accept_edited)
    ids = SeenIds()
    rows = 0
    place = str(path)
    for item in scan_rows(path, manifest, digest):
        rows += 1
        if isinstance(item, Fault):
            faults.add_fault(item.place_in(path), item)
        else:
            where = f"{place}:{item.line}"
            try:
                parsed = parse_candidate_set(item.value, where)
            except RowError as error:
                for text in error.faults:
                    faults.add(text)
            else:
                if item.value.get("id") and parsed.id in ids:
                    faults.add(
                        f"{where}: id: {parsed.id!r} is used in an earlier row; ids must be unique "
                        "in a file: remove the key, or make the file again with "
                        "`rrhf data convert --new_ids`"
                    )
                elif not faults:
                    yield item, ids.give(parsed), parsed.id
        if faults.is_full:
            break
    faults.raise_if_any()
    if rows == 0:
        raise UserError(
            f"{path}: holds no rows; make the file again, or name the file that you meant"
        )


def read_candidate_sets(path: PathLike, accept_edited: bool = False) -> Iterator[CandidateSet]:
    """Read the sets of a candidate file, one in memory at a time.

    Args:
        path: the file.
        accept_edited: read the file even if it does not match its manifest.

    Raises:
        UserError: the file is missing, empty, unfinished, has faulty rows, or was changed since it
            was written. Sets before the first fault have already been yielded by then; open a
            `CandidateFile` to have the whole file checked first.
    """
    for _, candidate_set, _ in _scan_sets(path, accept_edited):
        yield candidate_set


class CandidateFile(IndexedSets):
    """Reads the rows of a candidate file by index; only their offsets and lengths are in memory.

    A file that a stage wrote and that matches its manifest is hashed when it is opened, not parsed,
    because its rows were checked when they were written. A gzip file is unpacked to a
    temporary file. Reading does not move the file position, so forked workers may share the object.

    Attributes:
        path: the file, or the name given to `spool`.
        manifest: the file's manifest, or None.
        columns: the columns of all rows, in order of first appearance; empty if the rows were not
            parsed.
        digest: SHA-256 of the file, or of the spooled rows.
        num_candidates: the number of candidates in all rows.
        is_as_written: whether each row is a line exactly as `encode_row` writes it.
    """

    columns: tuple[str, ...] = ()

    def __init__(self, path: PathLike, accept_edited: bool = False) -> None:
        """Open and check the whole file.

        Args:
            path, accept_edited: as for `read_candidate_sets`.

        Raises:
            UserError: in the same cases as `read_candidate_sets`.
        """
        self._start(path, require_finished(path))
        before = _identity(path)
        if not self._index_as_written():
            self._check(accept_edited)
        self._open(before)

    @classmethod
    def as_written(cls, path: PathLike) -> CandidateFile | None:
        """Open a file that a stage wrote and that matches its manifest; None for any other file.

        Raises:
            UserError: the manifest says that the file is unfinished.
        """
        file = cls.__new__(cls)
        file._start(path, require_finished(path))
        before = _identity(path)
        if not file._index_as_written():
            return None
        file._open(before)
        return file

    def _open(self, before: tuple[int, ...] | None) -> None:
        """Open the file, or its unpacked copy, for reading rows.

        Args:
            before: the file's `_identity` before its rows were indexed.

        Raises:
            UserError: the file was changed while its rows were indexed.
        """
        self._file = _seekable(self.path)
        if _identity(self.path) != before:
            self._file.close()
            raise self.was_changed()
        self._is_copy = is_compressed(self.path)

    def _start(self, name: PathLike, manifest: dict[str, Any] | None) -> None:
        self.path, self.manifest = Path(name), manifest
        self.num_candidates = 0
        self.is_as_written = False
        self._is_copy = False
        self._offsets, self._lengths = array("Q"), array("Q")
        self._numbered: dict[int, str] = {}  # new ids of rows whose id repeats

    def _index_as_written(self) -> bool:
        """Index the rows by their line ends; return False if the file does not match its manifest.

        Also False if the manifest does not count rows, bytes and candidates: only files whose rows
        were written from records have all three counts.
        """
        manifest = self.manifest or {}
        if not all(isinstance(manifest.get(name), int) for name in ("rows", "bytes", "candidates")):
            return False
        digest = Digest()
        lengths = array("Q")
        try:
            with open_bytes(self.path, digest) as file:
                while lines := file.readlines(READ_BYTES):
                    lengths.extend(map(len, lines))
        except UNREADABLE:
            return False
        is_changed = seal_difference(self.path, manifest, digest, len(lengths)) is not None
        if is_changed or manifest.get("sha256") is None or not lengths:
            return False
        self._offsets.extend(accumulate(lengths[:-1], initial=0))
        self._lengths, self.digest = lengths, digest.hexdigest()
        self.num_candidates = manifest["candidates"]
        self.is_as_written = True
        return True

    def _check(self, accept_edited: bool) -> None:
        """Index the rows by parsing each of them.

        Raises:
            UserError: in the same cases as `read_candidate_sets`.
        """
        columns: dict[str, None] = {}
        digest = Digest()
        for row, candidate_set, own_id in _scan_sets(self.path, accept_edited, digest):
            self._offsets.append(row.offset)
            self._lengths.append(row.length)
            if candidate_set.id != own_id:
                self._numbered[len(self._offsets) - 1] = candidate_set.id
            self.num_candidates += len(candidate_set.candidates)
            if not row.value.keys() <= columns.keys():
                columns.update(dict.fromkeys(row.value))
        self.columns, self.digest = tuple(columns), digest.hexdigest()

    @classmethod
    def spool(cls, sets: Iterable[CandidateSet], name: PathLike) -> CandidateFile:
        """Write sets from any source to an unnamed temporary file, and open that file.

        Repeated ids get an occurrence number.
        """
        spooled = cls.__new__(cls)
        spooled._start(name, None)
        ids, digest = SeenIds(), Digest()
        with _temporary_file("rrhf-spool") as file:
            for candidate_set in sets:
                data = encode_row(candidate_set_to_row(ids.give(candidate_set)))
                spooled._offsets.append(digest.num_bytes)
                spooled._lengths.append(len(data))
                spooled.num_candidates += len(candidate_set.candidates)
                file.write(data)
                digest.update(data)
            file.flush()
        spooled._file, spooled.digest = file, digest.hexdigest()
        spooled.is_as_written = True
        return spooled

    def __len__(self) -> int:
        return len(self._offsets)

    def _at(self, number: int) -> CandidateSet:
        return self._read(number, number + 1)[0]

    def __iter__(self) -> Iterator[CandidateSet]:
        for first in range(0, len(self), _BLOCK_ROWS):
            yield from self[first : first + _BLOCK_ROWS]

    @overload
    def __getitem__(self, index: int) -> CandidateSet: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[CandidateSet]: ...
    def __getitem__(self, index: int | slice) -> CandidateSet | Sequence[CandidateSet]:
        if isinstance(index, slice):
            first, end, step = index.indices(len(self))
            if step == 1 and first < end:
                return self._read(first, end)
        return super().__getitem__(index)

    def lines(self) -> Iterator[bytes]:
        """Yield the bytes of each row; a row of JSON lines includes its newline.

        Raises:
            UserError: the file was changed since it was opened. This is checked before the last
                rows are yielded, and only for an uncompressed file with `is_as_written`.
        """
        digest = Digest()
        is_checked = self.is_as_written and not self._is_copy
        for first in range(0, len(self), _BLOCK_ROWS):
            end = min(first + _BLOCK_ROWS, len(self))
            lines = self._bytes(first, end)
            digest.update(b"".join(lines))
            if is_checked and end == len(self) and digest.hexdigest() != self.digest:
                raise self.was_changed()
            yield from lines

    def was_changed(self) -> UserError:
        """Build the error for a file that was changed since it was opened."""
        return UserError(
            f"{self.path}: was changed while it was read; do not change a file while it is used"
        )

    def _bytes(self, first: int, end: int) -> list[bytes]:
        """Read the bytes of rows `first` to `end - 1`, in one read unless they are large."""
        start = self._offsets[first]
        size = self._offsets[end - 1] + self._lengths[end - 1] - start
        if size > _BLOCK_BYTES and end - first > 1:
            middle = (first + end) // 2
            return self._bytes(first, middle) + self._bytes(middle, end)
        data = os.pread(self._file.fileno(), size, start)
        return [
            data[offset - start : offset - start + length]
            for offset, length in zip(
                self._offsets[first:end], self._lengths[first:end], strict=True
            )
        ]

    def _read(self, first: int, end: int) -> list[CandidateSet]:
        place = str(self.path)
        found: list[CandidateSet] = []
        number = first
        try:
            for number, value in enumerate(decode_rows(self._bytes(first, end)), start=first):
                parsed = parse_candidate_set(value, f"{place}, row {number + 1}")
                if number in self._numbered:
                    parsed = replace(parsed, id=self._numbered[number])
                found.append(parsed)
        except ValueError as error:
            raise UserError(
                f"{self.path}: row {number + 1} no longer reads as it did when the file was "
                f"opened ({error}); do not change a file while it is used"
            ) from error
        return found

    def close(self) -> None:
        self._file.close()


def _identity(path: PathLike) -> tuple[int, ...] | None:
    """Return a value that changes when a file is written or replaced; None if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _seekable(path: PathLike) -> BinaryIO:
    """Open a file for reading at any offset; a gzip file is unpacked to a temporary file."""
    file = open_bytes(path)
    if not is_compressed(path):
        return file
    with file, _temporary_file(Path(path).name) as temporary:
        shutil.copyfileobj(file, temporary, 1 << 20)
        temporary.flush()
    return temporary


@contextmanager
def _temporary_file(name: str) -> Iterator[BinaryIO]:
    """Create an unnamed file that stays open after the body; it is removed if the body raises.

    Args:
        name: what error messages call the file, for instance when the disk is full.
    """
    with explained_os_errors(Path(tempfile.gettempdir()) / name):
        file = cast(BinaryIO, tempfile.TemporaryFile(prefix="rrhf-"))  # noqa: SIM115
        try:
            yield file
        except BaseException:
            with suppress(OSError):  # what could not be written cannot be flushed
                file.close()
            raise


def write_candidate_sets(
    path: PathLike, sets: Iterable[CandidateSet], manifest: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write a candidate file atomically, then its manifest; gzip if the name ends in .gz.

    Repeated ids get an occurrence number. If anything fails, the old file and manifest stay as
    they were.

    Args:
        path: the file.
        sets: the rows, taken one at a time.
        manifest: further entries for the manifest (engine, scorer, seed, what was dropped).

    Returns:
        The manifest as written, which also has "rows", "candidates", "scored_candidates", "bytes"
        and "sha256".
    """
    rows = candidates = scored = 0
    ids = SeenIds()
    with replaced_rows(path) as (sink, digest):
        for candidate_set in sets:
            given = ids.give(candidate_set)
            sink.write(encode_row(candidate_set_to_row(given)))
            rows += 1
            candidates += len(given.candidates)
            scored += sum(score is not None for score in given.scores)
    written = {
        "status": COMPLETE,
        "rows": rows,
        "candidates": candidates,
        "scored_candidates": scored,
        **(manifest or {}),
        **digest.as_dict(),
    }
    write_manifest(path, written)
    return written


@contextmanager
def replaced_rows(path: PathLike) -> Iterator[tuple[BinaryIO, Digest]]:
    """Replace a file of rows, either completely or not at all.

    If the name ends in .gz, the rows are compressed; the same rows always give the same bytes. The
    old file's manifest is removed, because it does not describe the new rows.

    Yields:
        Where to write the rows, and the digest of the new file.
    """
    with replaced_file(path) as file:
        packed: Any = nullcontext(file)
        if os.fspath(path).endswith(".gz"):
            packed = gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0)
        with packed as sink:
            yield sink, file.digest
        file.sync()
        forget_manifest(path)
