"""A model folder that takes the place of an older one: a kill at any moment leaves one of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from kills import Zygote
from saved_folder_job import save

from rrhf.manifests import UNFINISHED, write_manifest
from rrhf.runs import RunFolder
from rrhf.sealed_folders import damage_of
from rrhf.staged_folders import remove_unfinished, saved_folder


def text_of(folder: Path) -> str:
    """What its files say, all of them the same."""
    assert damage_of(folder) is None
    (text,) = {(folder / name).read_text() for name in ("weights", "config")}
    return text


def between(folder: Path) -> None:
    """As a kill between the two renamings leaves it."""
    save(folder, "new")
    (folder / "policy").rename(folder / "new")
    save(folder, "old")
    (folder / "policy").rename(folder / ".doomed-policy")
    (folder / "new").rename(folder / ".staged-policy")


def test_a_kill_at_every_file_operation_leaves_one_of_the_two(tmp_path: Path) -> None:
    """Where it falls between the renamings, the clean-up too is killed at each of its own."""
    folder = tmp_path / "run"
    seen: list[list[str]] = []
    with Zygote("saved_folder_job:save_or_sweep", {"folder": str(folder)}) as zygote:

        def is_killed(operation: int) -> bool:
            return bool(zygote.run(kill_at_operation=operation, folder=folder)["signal"])

        for operation in range(1, 100):
            shutil.rmtree(folder, ignore_errors=True)
            save(folder, "old")
            if not is_killed(operation):
                break
            seen.append(sorted(path.name for path in folder.iterdir()))
            if "policy" not in seen[-1]:
                left = shutil.copytree(folder, tmp_path / f"left-{operation}")
                for place in range(1, 100):
                    shutil.rmtree(folder)
                    shutil.copytree(left, folder)
                    if not is_killed(place):
                        break
                    remove_unfinished(folder)
                    assert text_of(folder / "policy") in ("old", "new")
            remove_unfinished(folder)
            assert text_of(folder / "policy") in ("old", "new")
            assert [path.name for path in folder.iterdir()] == ["policy"]
    assert text_of(folder / "policy") == "new" and len(seen) > 10
    assert [".doomed-policy", ".staged-policy"] in seen


@pytest.mark.parametrize(
    ("damaged", "left"),
    [([], "new"), ([".staged-policy"], "old"), ([".staged-policy", ".doomed-policy"], None)],
)
def test_the_new_one_is_taken_where_it_is_whole(
    damaged: list[str], left: str | None, tmp_path: Path
) -> None:
    between(tmp_path)
    for name in damaged:
        (tmp_path / name / "weights").write_text("cut")
    remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == (["policy"] if left else [])
    assert left is None or text_of(tmp_path / "policy") == left


def test_what_has_its_place_is_not_touched(tmp_path: Path) -> None:
    between(tmp_path)
    save(tmp_path / "third", "third")
    (tmp_path / "third" / "policy").rename(tmp_path / "policy")
    (tmp_path / "third").rmdir()
    remove_unfinished(tmp_path)
    assert text_of(tmp_path / "policy") == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]


def test_an_older_checkpoint_that_was_being_deleted_stays_deleted(tmp_path: Path) -> None:
    """Nothing was to take its place."""
    save(tmp_path, "old")
    (tmp_path / "policy").rename(tmp_path / ".doomed-step-1")
    (tmp_path / ".staged-4").mkdir()
    remove_unfinished(tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_the_next_save_puts_it_back_first(tmp_path: Path) -> None:
    """One that fails must not cost what the killed one had."""

    def fail(staged: Path) -> None:
        raise ZeroDivisionError

    between(tmp_path)
    with pytest.raises(ZeroDivisionError):
        saved_folder(tmp_path / "policy", fail)
    assert text_of(tmp_path / "policy") == "new"


@pytest.mark.parametrize("place", [".", "policies"])
def test_opening_the_run_puts_it_back(place: str, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.open({"output_dir": str(tmp_path)}, resume=False)
    write_manifest(tmp_path, {"status": UNFINISHED})
    (tmp_path / place).mkdir(exist_ok=True)
    between(tmp_path / place)
    run.close()
    run = RunFolder(tmp_path)
    run.open({"output_dir": str(tmp_path)}, resume=True)
    run.close()
    assert text_of(tmp_path / place / "policy") == "new"
    hidden = {path.name for path in (tmp_path / place).rglob(".*")}
    assert hidden <= {".lock"}
