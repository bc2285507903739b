"""The demonstration at its small size, from nothing to the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets
from rrhf.evaluation.bootstrap import paired_difference
from rrhf.evaluation.results import load_row, measure_from_json
from rrhf.evaluation.shared import Shared
from rrhf.models.loading import load_causal_lm
from rrhf.report.pooling import pooled_rows
from rrhf.studies import rows
from rrhf.studies.demo import DemoConfig, run_demo
from rrhf.worlds.help_desk.recipe import RECIPES


@pytest.fixture(scope="module", params=["shorter", pytest.param("whole", marks=pytest.mark.slow)])
def demo(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """Shorter: PPO has seven rollouts of ten, and perplexities are those of fewer texts."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "shorter":
            smoke = RECIPES["smoke"]
            patch.setitem(
                RECIPES, "smoke", replace(smoke, online=replace(smoke.online, num_rollouts=7))
            )
            patch.setattr(rows, "Shared", with_fewer_texts)
        run_demo(DemoConfig(output_dir=str(folder), size="smoke"), said.append)
    return folder, said


def with_fewer_texts(prompts: Any, *, human: Any, pairs: Any, **settings: Any) -> Shared:
    return Shared(prompts, human=human[:40], pairs=pairs[:50], **settings)


def row(folder: Path, name: str) -> dict:
    return load_row(folder / "seed-0" / "evaluation" / f"{name}.json")


def test_the_table_has_every_row_with_intervals(demo: tuple[Path, list[str]]) -> None:
    folder, said = demo
    page = (folder / "table.md").read_text()
    for name in (
        "SFT",
        "SFT greedy",
        "best of 4",
        "best-of-4 fine-tuning",
        "RRHF",
        "RRHF round 2",
        "PPO",
    ):
        assert f"| {name} |" in page
    assert row(folder, "RRHF")["metrics"]["gold"]["low"] is not None
    ending = said[-1]
    for what in ("policy", "samples", "table", "bash train.sh"):
        assert what in ending
    assert (folder / "seed-0" / "rrhf-2" / "policy" / "model.safetensors").is_file()


def test_rrhf_raises_the_true_preference(demo: tuple[Path, list[str]]) -> None:
    """Bars far below what was seen (.20 to .32 over three seeds), so only a break falls below."""
    folder, _ = demo
    sft, rrhf = row(folder, "SFT"), row(folder, "RRHF")
    gain = paired_difference(
        measure_from_json(rrhf["per_prompt"]["gold"]), measure_from_json(sft["per_prompt"]["gold"])
    )
    assert gain.mean is not None and gain.mean > 0.05
    assert rrhf["metrics"]["reward"]["mean"] > sft["metrics"]["reward"]["mean"] + 0.1
    assert 0.3 < sft["metrics"]["win_gold"]["mean"] < 0.7
    assert rrhf["metrics"]["kl"]["mean"] > 0.1
    evaluation = json.loads((folder / "seed-0" / "reward" / "manifest.json").read_text())
    assert evaluation["evaluation"]["accuracy"] > 0.65
    ppo = row(folder, "PPO")
    assert ppo["metrics"]["gold"]["mean"] > sft["metrics"]["gold"]["mean"] + 0.05


def test_candidates_feed_the_trainer_unchanged(demo: tuple[Path, list[str]]) -> None:
    folder, _ = demo
    sets = list(read_candidate_sets(folder / "seed-0" / "round-1" / "train_data.json"))
    assert len(sets) == 200
    assert all(len(s.candidates) == 4 and None not in s.scores for s in sets)


def test_weights_moved_and_the_ablation_is_another_policy(demo: tuple[Path, list[str]]) -> None:
    folder, _ = demo
    policies = {
        name: load_file(folder / "seed-0" / name / "policy" / "model.safetensors")
        for name in ("sft", "best-of-n", "rrhf", "rrhf-2", "ppo")
    }
    key = "model.layers.0.mlp.up_proj.weight"
    weights = [policy[key] for policy in policies.values()]
    assert len({float(w.sum()) for w in weights}) == 5
    load_causal_lm(folder / "seed-0" / "rrhf-2" / "policy")


def test_a_second_call_does_nothing_twice(
    demo: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = demo
    before = (folder / "table.md").read_text()
    said: list[str] = []
    run_demo(DemoConfig(output_dir=str(folder), size="smoke"), said.append)
    assert any("[12/12]" in text and "done before" in text for text in said)
    assert sum("done before" in text for text in said) == 12
    assert (folder / "table.md").read_text() == before


def test_seeds_are_pooled_by_prompt(demo: tuple[Path, list[str]]) -> None:
    folder, _ = demo
    rows = [row(folder, "SFT"), row(folder, "RRHF")]
    pooled = pooled_rows([rows, rows])
    for one, both in zip(rows, pooled, strict=True):
        single, double = one["metrics"]["gold"], both["metrics"]["gold"]
        assert double["n"] == 2 * single["n"]
        assert abs(double["mean"] - single["mean"]) < 1e-9
        assert double["high"] - double["low"] < single["high"] - single["low"]
        exact = both["metrics"]["ppl_reference"]["mean"] - one["metrics"]["ppl_reference"]["mean"]
        assert abs(exact) < 1e-9
        assert len(both["per_prompt"]["gold"]["values"]) == double["n"]


def test_mistakes_cost_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--output_dir", str(tmp_path / "x"), "--seeds", "0"]) == 2
    assert main(["demo", "--output_dir", str(tmp_path / "x"), "--sizes", "smoke"]) == 2
    assert "--size" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
