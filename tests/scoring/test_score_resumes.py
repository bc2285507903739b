"""`rrhf score` continues: after a kill, with other processes; what it refuses to continue."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from kills import Zygote
from reward_cases import conversation, language_model_folder, reward_model_folder
from score_cases import (
    NUM_PROMPTS,
    candidates_in,
    config_of,
    leftovers,
    some_sets,
)

from rrhf.cli.main import run_command
from rrhf.data.candidate_files import read_candidate_sets, write_candidate_sets
from rrhf.errors import EXIT_STOPPED_BY_SIGTERM, StoppedBySignal, UserError
from rrhf.manifests import manifest_path, write_manifest
from rrhf.records import Candidate, CandidateSet
from rrhf.scoring import stage as stage_module
from rrhf.scoring.reward_model import RewardModelScorer
from rrhf.scoring.stage import score_file


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(reward_model_folder(tmp_path_factory.mktemp("rm") / "rm"))


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> str:
    return candidates_in(tmp_path_factory.mktemp("candidates"))


@pytest.fixture(scope="module")
def straight(model: str, candidates: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("straight") / "scored.jsonl"
    return score_file(config_of(candidates, output, model))


def test_a_finished_file_is_left_alone(straight: Path, candidates: str, model: str) -> None:
    before = (straight.read_bytes(), straight.stat().st_mtime_ns)
    score_file(config_of(candidates, straight, model))
    assert (straight.read_bytes(), straight.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"normalize": False}, "normalize"),
        ({"only_missing": True}, "only_missing"),
        ({"score_at": "first_eos"}, "score_at"),
        ({"max_length": 64}, "max_length"),
    ],
)
def test_other_settings_are_refused(
    changes: dict[str, Any], names: str, straight: Path, candidates: str, model: str
) -> None:
    with pytest.raises(UserError, match=f"begun with other settings:\n  {names}: "):
        score_file(config_of(candidates, straight, model, **changes))


def test_another_model_or_input_is_refused(
    straight: Path, candidates: str, model: str, tmp_path: Path
) -> None:
    other = reward_model_folder(tmp_path / "rm", seed=1)
    with pytest.raises(UserError, match="scorer_fingerprint"):
        score_file(config_of(candidates, straight, str(other)))
    write_candidate_sets(tmp_path / "fewer.jsonl", some_sets()[:-1], {})
    with pytest.raises(UserError, match="input_sha256"):
        score_file(config_of(str(tmp_path / "fewer.jsonl"), straight, model))


def test_a_changed_function_is_refused(
    candidates: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rules = tmp_path / "rules_for_a_test.py"
    rules.write_text("def score(p, r, m):\n    return [1.0] * len(r)\n")
    config = config_of(candidates, "out.jsonl", "function:rules_for_a_test:score")
    score_file(config)
    rules.write_text("def score(p, r, m):\n    return [2.0] * len(r)\n")
    with pytest.raises(UserError, match="scorer_fingerprint"):
        score_file(config)


def test_inputs_that_are_unfinished_or_the_output_are_refused(
    candidates: str, tmp_path: Path
) -> None:
    scorer = "function:score_cases:length_of"
    with pytest.raises(UserError, match="is also the input file"):
        config_of(candidates, candidates, scorer)
    raw = tmp_path / "raw.jsonl"
    write_candidate_sets(raw, some_sets(), {})
    write_manifest(raw, {"status": "unfinished"})
    with pytest.raises(UserError, match="unfinished"):
        score_file(config_of(str(raw), tmp_path / "out.jsonl", scorer))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_file_whose_manifest_would_be_another_one_s_is_refused(tmp_path: Path) -> None:
    scorer = "function:score_cases:length_of"
    raw = tmp_path / "c.jsonl"
    write_candidate_sets(raw, some_sets(), {})
    before = manifest_path(raw).read_bytes()
    with pytest.raises(UserError, match=r"belongs to c\.jsonl"):
        score_file(config_of(str(raw), tmp_path / "c.json", scorer))
    assert manifest_path(raw).read_bytes() == before
    manifest_path(raw).unlink()
    with pytest.raises(UserError, match=r"belongs to c\.jsonl"):
        score_file(config_of(str(raw), tmp_path / "c.json", scorer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl"]
    score_file(config_of(str(raw), tmp_path / "d.json", scorer))


class _EditsItsInput:
    """A scorer that changes the input file in place once it has scored the first chunk."""

    name, quantity, unit, window = "edits", "length", "", None

    def __init__(self, path: Path, edit: Callable[[bytes], bytes]) -> None:
        self.path, self.edit = path, edit

    def score(self, sets: Sequence[CandidateSet]) -> list[list[float | None]]:
        if any("friend 1" in c.response for s in sets for c in s.candidates):
            data = self.edit(self.path.read_bytes())
            with self.path.open("r+b") as file:  # the same file, as an editor or `>` leaves it
                file.write(data)
                file.truncate()
        return [[float(len(c.response)) for c in s.candidates] for s in sets]

    def fits(self, s: CandidateSet, candidate: Candidate) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "normalized": False}


@pytest.mark.parametrize(
    "edit",
    [
        lambda data: data.replace(b"friend 0", b"FRIEND 0", 1),
        lambda data: data.replace(b"friend 0", b"good friend 0", 1),
        lambda data: data[: len(data) // 2],
        lambda data: b"",
    ],
    ids=["same size", "longer", "cut", "empty"],
)
def test_an_input_that_is_edited_after_it_was_scored_is_noticed(
    edit: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path, output = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    texts = [f"ask a friend {j}" for j in range(2)]
    write_candidate_sets(path, [conversation(f"why {i}", *texts) for i in range(3)], {})
    config = config_of(str(path), output, "edits")
    with pytest.raises(UserError, match=r"raw\.jsonl: was changed while it was read; do not"):
        score_file(config, make_scorer=lambda _: _EditsItsInput(path, edit))
    assert not output.exists()


def test_an_input_may_lose_its_manifest_between_a_stop_and_the_next_call(
    candidates: str, tmp_path: Path
) -> None:
    path, output = tmp_path / "raw.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(Path(candidates).read_bytes())
    shutil.copy(manifest_path(candidates), manifest_path(path))
    values = json.loads(manifest_path(path).read_text()) | {"file": path.name}
    manifest_path(path).write_text(json.dumps(values))
    fails = "function:score_cases:none_of_friend_2"
    with pytest.raises(UserError, match="could not be scored"):
        score_file(config_of(str(path), output, fails))
    manifest_path(path).unlink()
    score_file(config_of(str(path), output, fails, max_unscored_fraction=0.5))
    straight = score_file(
        config_of(str(path), tmp_path / "straight.jsonl", fails, max_unscored_fraction=0.5)
    )
    assert output.read_bytes() == straight.read_bytes()


def test_mistakes_leave_no_file_behind(candidates: str, tmp_path: Path) -> None:
    base = language_model_folder(tmp_path / "lm")
    raw = tmp_path / "raw.jsonl"
    raw.write_text('{"query": "q", "responses": ["a"], "scores": [NaN]}\n')
    gold = "gold:help_desk"
    cases = [
        (str(tmp_path / "none.jsonl"), gold, {}, r"none\.jsonl"),
        (str(raw), gold, {}, r"raw\.jsonl:1: scores\[0\]"),
        (candidates, str(base), {}, "not a reward model"),
        (candidates, str(tmp_path / "none"), {}, "no such model folder"),
        (candidates, str(base), {"reward_format": "trlx"}, "v_head|transformer"),
        (candidates, str(tmp_path), {"reward_format": "trlx"}, "no weights here"),
        (candidates, "function:nothing_here:score", {}, "cannot be imported"),
        (candidates, "gold:moon", {}, "gold:help_desk"),
    ]
    for source, scorer, changes, message in cases:
        output = tmp_path / "out" / "out.jsonl"
        with pytest.raises(UserError, match=message):
            score_file(config_of(source, output, scorer, **changes))
        assert not output.parent.exists()


def test_the_command_takes_both_files_as_words(
    candidates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "out.jsonl")
    scorer = "function:score_cases:length_of"
    assert run_command(["score", candidates, output, "--scorer", scorer]) == 0
    assert output in capsys.readouterr().out
    assert len(list(read_candidate_sets(output))) == NUM_PROMPTS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts_per_chunk": 0}, "--prompts_per_chunk 0: must be 1 or more"),
        ({"max_unscored_fraction": 1.5}, r"--max_unscored_fraction 1\.5: must be between 0 and 1"),
    ],
)
def test_impossible_settings_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of("a", "b", "c", **changes)


def test_sigterm_keeps_what_is_done(
    candidates: str, model: str, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    class Interrupted(RewardModelScorer):
        def score(self, sets: Any) -> list[list[float | None]]:
            nonlocal calls
            calls += 1
            if calls == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
            return super().score(sets)

    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(stage_module, "build_scorer", lambda *_: Interrupted(model))
        assert threading.current_thread() is threading.main_thread()
        with pytest.raises(StoppedBySignal, match="8 of 23 prompts") as stopped:
            score_file(config_of(candidates, output, model))
    assert stopped.value.exit_code == EXIT_STOPPED_BY_SIGTERM
    score_file(config_of(candidates, output, model))
    assert output.read_bytes() == straight.read_bytes()


def test_processes_share_the_work_and_write_the_same_bytes(
    candidates: str, model: str, straight: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = {"candidates": candidates, "output": str(output), "model": model}
    with Zygote("test_score_resumes:as_rank", arguments) as zygote:
        assert zygote.run_ranks() == [0, 0]
    assert output.read_bytes() == straight.read_bytes()
    assert leftovers(output) == []


def test_twenty_kills_lose_and_double_nothing(
    candidates: str, model: str, straight: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    arguments = {"candidates": candidates, "output": str(output), "model": model}
    moments, kills, rounds = random.Random(3), 0, 0
    with Zygote("test_score_resumes:slowly", arguments) as zygote:
        whole = zygote.run()["seconds"]
        while kills < 20 or rounds < 2:
            output.unlink(missing_ok=True)
            manifest_path(output).unlink(missing_ok=True)
            done = {"signal": 1}
            while done["signal"]:
                limit = moments.uniform(0.0, 0.8) * whole if kills < 20 else None
                done = zygote.run(kill_after_seconds=limit)
                kills += bool(done["signal"])
            assert done["exit"] == 0
            assert output.read_bytes() == straight.read_bytes()
            assert leftovers(output) == []
            rounds += 1


def test_a_kill_at_every_file_operation_loses_and_doubles_nothing(
    candidates: str, model: str, straight: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "out.jsonl"
    arguments = {"candidates": candidates, "output": str(output), "model": model}
    with Zygote("test_score_resumes:quickly", arguments) as zygote:
        operations = zygote.run(folder=output.parent)["operations"]
        assert operations > 10
        for operation in range(1, operations + 1):
            for path in output.parent.iterdir():
                path.unlink()
            assert zygote.run(kill_at_operation=operation, folder=output.parent)["signal"]
            assert zygote.run()["exit"] == 0, operation
            assert output.read_bytes() == straight.read_bytes(), operation
            assert leftovers(output) == [], operation


def quickly(candidates: str, output: str, model: str, rank: int = 0, world_size: int = 1) -> None:
    """The job, as another process does it."""
    score_file(config_of(candidates, output, model), rank, world_size)


def as_rank(candidates: str, output: str, model: str) -> None:
    """The job as one process of several does it."""
    quickly(candidates, output, model, *(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")))


def slowly(candidates: str, output: str, model: str) -> None:
    """The job with a pause between rows, so that kills fall between them too."""
    part_row = stage_module._Stage._part_row

    def paused(*arguments: Any) -> dict[str, Any]:
        time.sleep(0.01)
        return part_row(*arguments)

    stage_module._Stage._part_row = paused  # type: ignore[method-assign]
    quickly(candidates, output, model)


def test_other_patience_does_not_make_another_file(candidates: str, tmp_path: Path) -> None:
    """How long processes wait for each other says nothing of the scores."""
    output, function = tmp_path / "scored.jsonl", "function:score_cases:length_of"
    score_file(config_of(candidates, output, function, wait_seconds=5.0))
    before = output.read_bytes(), manifest_path(output).read_bytes()
    score_file(config_of(candidates, output, function, wait_seconds=50.0))
    assert (output.read_bytes(), manifest_path(output).read_bytes()) == before


def test_a_file_of_before_these_settings_is_complete(candidates: str, tmp_path: Path) -> None:
    """What is no setting of the scores may not stand among them: older files lack it."""
    output, function = tmp_path / "scored.jsonl", "function:score_cases:length_of"
    score_file(config_of(candidates, output, function))
    settings = json.loads(manifest_path(output).read_text())["settings"]
    assert settings.keys() & {"wait_seconds", "accept_edited_files", "columns"} == set()
