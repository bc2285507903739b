"""Candidate files: streamed or by index, whole or not written, all mistakes in one message."""

from __future__ import annotations

import errno
import gzip
import json
import os
import random
import tracemalloc
from pathlib import Path

import pytest

from rrhf.data import candidate_files
from rrhf.data.candidate_files import (
    CandidateFile,
    SeenIds,
    read_candidate_sets,
    write_candidate_sets,
)
from rrhf.errors import UserError
from rrhf.manifests import manifest_path, read_manifest, write_manifest
from rrhf.records import Candidate, CandidateSet, Message, set_id


def sample_sets(number: int = 20) -> list[CandidateSet]:
    draw = random.Random(0)
    sets = []
    for n in range(number):
        messages = (Message("user", f"q{n} é\u2028😀"),) if n % 3 == 0 else None
        query = f"\n\nHuman: q{n} é\u2028😀\n\nAssistant:"
        candidates = tuple(
            Candidate(f"r{k}\n", f"policy:{k}", draw.choice([None, draw.random()]), "stop")
            for k in range(n % 5)
        )
        sets.append(CandidateSet(set_id(query, messages), query, messages, candidates, "made"))
    return sets


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"query": "q", "responses": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str):
    sets = sample_sets()
    path = tmp_path / name
    write_candidate_sets(path, iter(sets), {"seed": 7})
    assert list(read_candidate_sets(path)) == sets
    file = CandidateFile(path)
    assert len(file) == len(sets) and list(file) == sets
    assert file[3] == sets[3] and file[-1] == sets[-1] and file[2:5] == sets[2:5]
    with pytest.raises(IndexError):
        file[len(sets)]
    assert file.manifest is not None and file.manifest["seed"] == 7
    assert name.endswith(".gz") == (path.read_bytes()[:2] == b"\x1f\x8b")


def test_a_published_array_reads_as_its_lines(tmp_path: Path):
    rows = [{**GOOD, "query": f"q{n}", "origin_scores": [3]} for n in range(5)]
    lines = write_lines(tmp_path / "lines.json", *rows)
    array = tmp_path / "array.json"
    array.write_text(json.dumps(rows, indent=2))
    assert list(CandidateFile(array)) == list(CandidateFile(lines))


def test_the_manifest_counts(tmp_path: Path):
    sets = sample_sets()
    written = write_candidate_sets(tmp_path / "f.json", sets)
    assert written["status"] == "complete"
    assert written["rows"] == 20
    assert written["candidates"] == sum(len(s.candidates) for s in sets)
    assert written["scored_candidates"] == sum(x is not None for s in sets for x in s.scores)
    manifest = read_manifest(tmp_path / "f.json")
    assert manifest is not None and manifest["file"] == "f.json"


def test_two_writes_of_the_same_give_the_same_bytes(tmp_path: Path):
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        write_candidate_sets(tmp_path / name, sample_sets())
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


# Ids.


def test_a_repeated_query_gets_an_occurrence_number(tmp_path: Path):
    path = write_lines(tmp_path / "f.json", GOOD, {**GOOD, "query": "other"}, GOOD, GOOD)
    base = set_id("q")
    expected = [base, set_id("other"), f"{base}-1", f"{base}-2"]
    assert [s.id for s in read_candidate_sets(path)] == expected
    file = CandidateFile(path)
    assert [file[n].id for n in range(4)] == expected
    write_candidate_sets(tmp_path / "again.json", file)
    assert [s.id for s in CandidateFile(tmp_path / "again.json")] == expected


def test_an_id_that_is_taken_is_stepped_over():
    ids = SeenIds()
    given = [ids.give(CandidateSet(i, "q")).id for i in ("x", "x-1", "x", "x", "x-1")]
    assert given == ["x", "x-1", "x-2", "x-3", "x-1-1"]
    assert len(set(given)) == 5


def test_an_own_id_that_repeats_is_a_mistake(tmp_path: Path):
    path = write_lines(tmp_path / "f.json", {**GOOD, "id": "x"}, {**GOOD, "id": "x"})
    with pytest.raises(UserError, match=r"f\.json:2: id: 'x' is used in an earlier row"):
        CandidateFile(path)


# Mistakes.


def test_all_mistakes_of_a_file_are_told_with_their_lines(tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_bytes(
        b'{"query": "good", "responses": []}\n'
        b'{"responses": ["a"]}\n'
        b'{"query": "q", "responses": ["a", "b"], "scores": [NaN, 1]}\n'
        b'{"query": "q", "responses": ["a", "b"], "scores": [1]}\n'
        b"not json\n"
        b'{"query": "q", "responses": ["\xff"]}\n'
        b'{"query": "good too", "responses": []}\n'
        b'{"query": "q", "resp'
    )
    for read in (lambda: list(read_candidate_sets(path)), lambda: CandidateFile(path)):
        with pytest.raises(UserError) as caught:
            read()
        lines = str(caught.value).splitlines()
        assert [line.removeprefix(f"{path}:").split(":")[0] for line in lines] == list("234568")
        assert "query: is missing" in lines[0]
        assert "scores[0]: is nan" in lines[1]
        assert "scores: holds 1 entries for 2 responses" in lines[2]


def test_sets_before_the_first_mistake_are_yielded(tmp_path: Path):
    path = write_lines(tmp_path / "f.json", GOOD, {"query": 1, "responses": []}, GOOD)
    found = []
    with pytest.raises(UserError):
        for item in read_candidate_sets(path):
            found.append(item)
    assert len(found) == 1


def test_twenty_mistakes_are_enough(tmp_path: Path):
    path = write_lines(tmp_path / "f.json", *[{"query": 1, "responses": []}] * 1000)
    with pytest.raises(UserError) as caught:
        CandidateFile(path)
    assert len(str(caught.value).splitlines()) == 21


@pytest.mark.parametrize("data", [b"", b"\n\n", b"[]"])
def test_an_empty_file(tmp_path: Path, data: bytes):
    path = tmp_path / "f.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match="holds no rows"):
        CandidateFile(path)


def test_a_cut_gzip(tmp_path: Path):
    path = tmp_path / "f.jsonl.gz"
    write_candidate_sets(path, sample_sets(500))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 20])
    with pytest.raises(UserError, match="gzip file is cut off"):
        CandidateFile(path)


def test_an_unfinished_input_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "f.json", GOOD)
    write_manifest(path, {"status": "unfinished"})
    for read in (lambda: list(read_candidate_sets(path)), lambda: CandidateFile(path)):
        with pytest.raises(UserError, match=r"f\.manifest\.json\) says 'unfinished'"):
            read()


def test_a_file_that_changes_while_it_is_read(tmp_path: Path):
    path = write_lines(tmp_path / "f.json", GOOD, {**GOOD, "query": "other"})
    file = CandidateFile(path)
    path.write_text("x" * 200)
    with pytest.raises(UserError, match="do not change a file while it is used"):
        file[1]


def test_a_file_that_is_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = write_lines(tmp_path / "f.json", GOOD)
    scan = candidate_files._scan_sets

    def replacing(*arguments: object):
        yield from scan(*arguments)
        write_lines(tmp_path / "other.json", {**GOOD, "scores": [1, 9]}).rename(path)

    monkeypatch.setattr(candidate_files, "_scan_sets", replacing)
    with pytest.raises(UserError, match="was changed while it was read"):
        CandidateFile(path)


@pytest.mark.parametrize("path", ["loop", "f.json/below"])
def test_a_path_that_leads_nowhere(tmp_path: Path, path: str):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "f.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be read|no such file"):
        CandidateFile(tmp_path / path)


def test_a_failing_write_leaves_file_and_manifest(tmp_path: Path):
    path = tmp_path / "f.json"
    write_candidate_sets(path, sample_sets(3), {"seed": 1})
    before = path.read_bytes(), manifest_path(path).read_bytes()

    def broken():
        yield from sample_sets(2)
        raise UserError("the input is bad")

    with pytest.raises(UserError, match="the input is bad"):
        write_candidate_sets(path, broken(), {"seed": 2})
    assert (path.read_bytes(), manifest_path(path).read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "f.manifest.json"]


def test_a_disk_that_is_full_at_the_end_leaves_file_and_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the buffer still holds is written last, and may be what does not fit."""
    path = tmp_path / "f.json"
    write_candidate_sets(path, sample_sets(3), {"seed": 1})
    before = path.read_bytes(), manifest_path(path).read_bytes()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for broken in ("rrhf.files._DigestedFile.write", "os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(broken, full)
            with pytest.raises(UserError, match="no space left"):
                write_candidate_sets(path, sample_sets(5), {"seed": 2})
        assert (path.read_bytes(), manifest_path(path).read_bytes()) == before, broken


def test_a_kill_before_the_manifest_leaves_no_old_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "f.json"
    write_candidate_sets(path, sample_sets(3))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rrhf.data.candidate_files.write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        write_candidate_sets(path, sample_sets(5))
    assert len(CandidateFile(path)) == 5 and read_manifest(path) is None


# Memory and processes.


def test_memory_holds_places_not_rows(tmp_path: Path):
    path = tmp_path / "f.json"
    rows = 4000
    with open(path, "w") as out:
        for n in range(rows):
            out.write(json.dumps({"query": f"{n} " + "x" * 1500, "responses": ["y" * 500]}) + "\n")
    tracemalloc.start()
    file = CandidateFile(path)
    for n in range(0, rows, 7):
        file[n]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 8_000_000
    # 16 bytes a row for its place and, while opening, about 150 for its id.
    assert peak < 2_000_000, peak


def test_forked_workers_read_the_same_file(tmp_path: Path):
    sets = sample_sets(200)
    path = tmp_path / "f.jsonl.gz"
    write_candidate_sets(path, sets)
    file = CandidateFile(path)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if all(file[n] == sets[n] for n in range(199, -1, -1)) else 1)
    assert all(file[n] == sets[n] for n in range(200))
    assert os.waitpid(pid, 0)[1] == 0


def test_spooled_sets_are_the_same_sets():
    sets = sample_sets()
    spooled = CandidateFile.spool(iter(sets), "a source")
    assert list(spooled) == sets
    twice = CandidateFile.spool([sets[0], sets[0]], "a source")
    assert [s.id for s in twice] == [sets[0].id, f"{sets[0].id}-1"]


def test_the_candidate_file_of_gzip_reads_its_own_copy(tmp_path: Path):
    path = tmp_path / "f.json"
    path.write_bytes(gzip.compress(json.dumps([GOOD]).encode()))
    file = CandidateFile(path)
    path.unlink()
    assert file[0].candidates[1] == Candidate("b", score=2.0)
