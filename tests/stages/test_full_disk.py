"""A full disk: free space is measured without what was written in vain, of which nothing stays."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from rrhf import files
from rrhf.cli.main import main
from rrhf.data.candidate_files import CandidateFile, write_candidate_sets
from rrhf.errors import UserError
from rrhf.records import Candidate, CandidateSet, set_id
from rrhf.stages import part_file
from rrhf.stages.part_file import FIRST_LINE

Usage = namedtuple("Usage", "total used free")
SCORER = "function:test_full_disk:by_length"


def by_length(prompts: list[str], responses: list[str], messages: list[Any]) -> list[float]:
    return [float(len(response)) for response in responses]


def used_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


class SmallDisk:
    """A folder that holds so many bytes and no more, for what this toolkit writes."""

    def __init__(self, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.size = folder, size
        self.seen: list[list[str]] = []
        write = os.write

        def handle_write(handle: int, data: Any) -> int:
            self._take(len(data))
            return write(handle, data)

        class Raw(files._DigestedFile):
            def write(self, data: Any) -> int:
                disk._take(len(data))
                return super().write(data)

        disk = self
        monkeypatch.setattr(files, "_DigestedFile", Raw)
        monkeypatch.setattr(part_file.os, "write", handle_write)
        monkeypatch.setattr(shutil, "disk_usage", self._usage)

    def _take(self, count: int) -> None:
        if used_in(self.folder) + count > self.size:
            raise OSError(errno.ENOSPC, "No space left on device")

    def _usage(self, folder: Any) -> Usage:
        used = used_in(self.folder)
        self.seen.append(sorted(path.name for path in self.folder.rglob("*")))
        return Usage(self.size, used, self.size - used)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    sets = [
        CandidateSet(
            set_id(f"q{n}"),
            f"q{n}",
            None,
            tuple(Candidate(f"{k}" * 300, "human:chosen") for k in (1, 2)),
        )
        for n in range(600)
    ]
    write_candidate_sets(path, sets)
    return path


COMMANDS = {
    "data convert": "data convert DATA OUT/c.jsonl",
    "data convert, packed": "data convert DATA OUT/c.jsonl.gz",
    "data convert --parts": "data convert DATA OUT --parts {a:0.5,b:0.5}",
    "data convert --to prompts": "data convert DATA OUT/p.jsonl --to prompts",
    "score": f"score DATA OUT/s.jsonl --scorer {SCORER}",
    "evaluate": f"evaluate --prompts DATA --responses dataset --output_dir OUT --scorer {SCORER}",
}  # fmt: skip


@pytest.mark.parametrize("size", [1000, 300_000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_is_free_without_its_own_file_and_goes_on_later(
    data: Path,
    tmp_path: Path,
    size: int,
    command: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    line = COMMANDS[command].replace("DATA", str(data)).replace("OUT", str(out))
    words = [
        word.replace(":", ": ").replace(",", ", ") if "{" in word else word for word in line.split()
    ]
    with pytest.MonkeyPatch.context() as patched:
        disk = SmallDisk(out, size, patched)
        code = main(words)
        told = capfd.readouterr().err
    if code == 0:
        assert "packed" in command or used_in(out) <= size
        return
    assert code == 2 and "no space left: " in told, told
    free = int(told.split(" bytes free there")[0].split()[-1].replace(",", ""))
    # a part without a row, which is one short line, goes after the message is made
    assert 0 <= size - used_in(out) - free <= len(FIRST_LINE)
    assert all(".tmp" not in name for names in disk.seen for name in names)
    assert not [path for path in out.rglob(".*") if path.name.endswith(".tmp")]
    assert main(words) == 0


def test_rows_of_other_forms_are_unpacked_to_a_file_that_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f.jsonl.gz"
    write_candidate_sets(path, [CandidateSet("a", "q", None, (Candidate("r"),))])
    opened: list[Any] = []
    closed: list[bool] = []
    temporary_file = tempfile.TemporaryFile

    def full(*args: Any, **options: Any) -> Any:
        file = temporary_file(*args, **options)
        opened.append(file)

        class Full(io.RawIOBase):
            def writable(self) -> bool:
                return True

            def write(self, data: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            def flush(self) -> None:
                pass

            def close(self) -> None:
                file.close()
                super().close()

        return Full()

    def usage(folder: Any) -> Usage:
        closed.extend(file.closed for file in opened)
        return Usage(1, 1, 0)

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(UserError, match="no space left"):
        CandidateFile(path)
    with pytest.raises(UserError, match="no space left"):
        CandidateFile.spool([CandidateSet("a", "q")], "a source")
    assert closed == [True, True, True]


def test_the_need_is_said_where_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallDisk(tmp_path, 10, monkeypatch)
    size = len(json.dumps("x" * 100)) + 1
    with pytest.raises(UserError, match=rf"x\.json: no space left: {size} bytes needed, 10 bytes"):
        files.write_json(tmp_path / "x.json", "x" * 100)
    with (
        pytest.raises(UserError, match=r"no space left: more than 0 bytes needed, 10 bytes free"),
        files.replaced_file(tmp_path / "y") as file,
    ):
        file.write(b"y" * 1000)
    assert list(tmp_path.iterdir()) == []
