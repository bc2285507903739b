"""The study of reward models on real pairs: its baselines, its folds, going on, the table."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import hh_baselines
import hh_reward
import pytest
import torch
from hh_reward import NGRAMS, SHORTER, HHRewardConfig, run
from reward_cases import conversation, language_model_folder
from trainer_cases import write_lines

from rrhf.data.views import first_turn
from rrhf.errors import UserError
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, CandidateSet


def pair(asked: str, chosen: str, rejected: str) -> CandidateSet:
    s = conversation(asked, chosen, rejected)
    sources = (CHOSEN_SOURCE, REJECTED_SOURCE)
    marked = (replace(c, source=source) for c, source in zip(s.candidates, sources, strict=True))
    return replace(s, candidates=tuple(marked))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 pairs under 30 first turns; who says "please" is preferred, at whatever length."""
    generator, rows = random.Random(0), []
    for i in range(60):
        fill = [" ".join(["friend"] * generator.randint(1, 4)) for _ in range(2)]
        prompt = f"\n\nHuman: how to {i % 30}\n\nAssistant:"
        rows.append({"chosen": f"{prompt} please {fill[0]}", "rejected": f"{prompt} no {fill[1]}"})
    return str(write_lines(tmp_path_factory.mktemp("hh") / "pairs.jsonl", rows))


def test_the_shorter_reply_is_counted_by_characters() -> None:
    found = [("a", "bb", 1.0), ("bb", "a", 0.0), ("ab", "cd", 0.5)]
    for chosen, rejected, verdict in found:
        assert hh_baselines.shorter_is_chosen(pair("why", chosen, rejected)) == verdict


def test_features_are_square_roots_of_counts_of_words_and_pairs() -> None:
    found = hh_baselines.features("No, no no")
    # words: no x3, "," x1; pairs: "no ,", ", no", "no no"
    assert sorted(found[found > 0].tolist()) == pytest.approx([1, 1, 1, 1, 3**0.5])
    assert torch.equal(hh_baselines.features("NO, no No"), found)
    assert hh_baselines.features("").sum() == 0


def test_bradley_terry_finds_the_minimum() -> None:
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    weights = hh_baselines.fit_bradley_terry(rows, 0.05).double()
    # At the minimum: l2 * w = mean of sigmoid(-w x) x
    lead = rows.double() @ weights
    slope = (torch.sigmoid(-lead)[:, None] * rows.double()).mean(0)
    torch.testing.assert_close(0.05 * weights, slope, rtol=0, atol=1e-4)


def test_a_study_with_its_folds_and_going_on(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = language_model_folder(tmp_path / "tiny-lm")
    config = HHRewardConfig(
        data,
        str(tmp_path / "out"),
        [str(trunk)],
        num_folds=3,
        num_train_epochs=4,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        model_max_length=64,
    )
    train, trained = hh_reward.train, []

    def counted(settings: Any) -> Path:
        if len(trained) == 1:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(settings.output_dir)
        return train(settings)

    monkeypatch.setattr(hh_reward, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    path = run(config)
    assert len(trained) == 4, "fold 0 once, fold 1 stopped and done again, fold 2"
    found = json.loads(path.read_text())
    assert (found["pairs"], found["first_turns"]) == (60, 30)
    methods = found["methods"]
    assert set(methods) == {SHORTER, NGRAMS, "tiny-lm"}
    for name in (NGRAMS, "tiny-lm"):
        accuracy = methods[name]["accuracy"]
        assert accuracy["mean"] > 0.9 and accuracy["n"] == 30
        assert methods[name]["minus"][SHORTER]["low"] > 0
    assert len(methods["tiny-lm"]["folds"]) == 3
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.count("\n| ") == 4 and "tiny-lm" in table

    before = path.read_bytes()
    assert run(config).read_bytes() == before and len(trained) == 4
    with pytest.raises(UserError, match="learning_rate"):
        run(replace(config, learning_rate=1e-3))


def test_every_pair_is_tested_once_and_no_first_turn_is_on_both_sides(
    data: str, tmp_path: Path
) -> None:
    seen: list[tuple[set[str], set[str]]] = []
    ids: list[str] = []

    def watch(config: Any, method: str, place: Path, rest: Any, test: Any) -> dict[str, Any]:
        if method == SHORTER:
            seen.append(({first_turn(s) for s in rest}, {first_turn(s) for s in test}))
            ids.extend(s.id for s in test)
        return {"correct": {s.id: 1.0 for s in test}}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hh_reward, "_one_fold", watch)
        run(HHRewardConfig(data, str(tmp_path / "out")))
    assert len(ids) == len(set(ids)) == 60
    assert len(seen) == 5 and all(not (rest & test) for rest, test in seen)


def test_pairs_that_do_not_fit_are_ties() -> None:
    from rrhf.data.collate import EncodedSet

    class Lengths(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, batch: Any) -> torch.Tensor:
            return batch.response_lengths.float()

    examples = [EncodedSet([1], [[1, 1, 1], [1]]), None, EncodedSet([1], [[1], [1, 1]])]
    leads = hh_reward.pair_leads(Lengths(), 0, examples)  # type: ignore[arg-type]
    assert leads == [2.0, 0.0, -1.0]


def test_the_command(data: str, tmp_path: Path) -> None:
    script = str(Path(hh_reward.__file__))
    words = ["--data_path", data, "--output_dir", str(tmp_path / "out"), "--num_folds", "2"]

    def called(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, script, *words, *more], capture_output=True, text=True, timeout=300
        )

    done = called()
    assert done.returncode == 0 and done.stdout == f"Results: {tmp_path}/out/results.json\n"
    refused = called("--trunks", str(tmp_path / "nowhere"))
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
    assert "nowhere" in refused.stderr


@pytest.mark.parametrize("changes", [{"num_folds": 1}, {"trunks": ["a/x", "b/x"]}])
def test_impossible_settings_are_told(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        HHRewardConfig("a", "b", **changes)
