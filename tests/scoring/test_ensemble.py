"""Several scorers as one: what each response gets, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_cases import build_world, settings
from reward_cases import conversation, reward_model_folder

from rrhf.algorithms.normalizers import RunningMeanStd
from rrhf.cli.main import main
from rrhf.data.candidate_files import read_candidate_sets, write_candidate_sets
from rrhf.errors import UserError
from rrhf.records import CandidateSet
from rrhf.scoring.build import RewardModelOptions, build_scorer, check_scorer, is_made
from rrhf.scoring.config import ScoreConfig
from rrhf.scoring.stage import score_file, scorer_fingerprint
from rrhf.sealed_folders import seal_folder
from rrhf.training.online import ppo
from rrhf.training.online.ppo_config import PPOConfig

torch.set_num_threads(1)


def text_length(prompts: list[str], responses: list[str], messages: list[Any]) -> list[float]:
    return [float(len(response)) for response in responses]


def words(prompts: list[str], responses: list[str], messages: list[Any]) -> list[float | None]:
    """None for a response with a question mark."""
    return [None if "?" in text else float(len(text.split())) for text in responses]


LENGTH, WORDS = "function:test_ensemble:text_length", "function:test_ensemble:words"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two reward models with a normaliser each, and one without."""
    place = tmp_path_factory.mktemp("models")
    made = []
    for seed, moments in enumerate(([0.0, 4.0], [1.0, 2.0], None)):
        normalizer = None
        if moments:
            normalizer = RunningMeanStd()
            normalizer.update(torch.tensor(moments))
        made.append(reward_model_folder(place / f"rm-{seed}", seed=seed, normalizer=normalizer))
    return made


def sets() -> list[CandidateSet]:
    return [
        conversation("how do I keep plants alive", "ask a friend", "", "no, no and no"),
        conversation("why"),
        conversation("say it again", "now then", "why? so"),
    ]


def test_functions_on_stated_scales_by_hand() -> None:
    """Lengths 12, 0, 13, 8, 7 about 10 in units of 2; words 3, 0, 4, 2, none about 2."""
    z = {"length": [1.0, -5.0, 1.5, -1.0], "words": [1.0, -2.0, 2.0, 0.0]}
    for rule, wanted in (
        ("mean:", [(a + b) / 2 for a, b in zip(*z.values(), strict=True)]),
        ("minimum:", [min(a, b) for a, b in zip(*z.values(), strict=True)]),
        ("mean_minus_deviation:", [min(a, b) for a, b in zip(*z.values(), strict=True)]),
    ):
        scorer = build_scorer(f"{rule}{LENGTH}@10/2,{WORDS}@2/1")
        assert scorer.normalized
        one, two, three = scorer.score(sets())
        assert one == pytest.approx(wanted[:3]) and two == []
        assert three[0] == pytest.approx(wanted[3]) and three[1] is None
    weighted = build_scorer(f"sum:0.25*{LENGTH}@10/2,-2*{WORDS}@2/1").score(sets())[0]
    assert weighted == pytest.approx([0.25 - 2, -1.25 + 4, 0.375 - 4])


def test_reward_models_are_combined_after_their_own_normalisers(folders: list[Path]) -> None:
    alone = [build_scorer(str(folder)).score(sets()) for folder in folders[:2]]
    scorer = build_scorer(f"mean:{folders[0]},{folders[1]}")
    for row, one, other in zip(scorer.score(sets()), *alone, strict=True):
        right = [(a + b) / 2 for a, b in zip(one, other, strict=True)]  # type: ignore[operator]
        assert row == pytest.approx(right)
    raw = RewardModelOptions(normalize=False)
    unnormalised = build_scorer(f"mean:{folders[0]},{folders[1]}", raw)
    assert not unnormalised.normalized
    raws = [build_scorer(str(folder), raw).score(sets())[0] for folder in folders[:2]]
    right = [(a + b) / 2 for a, b in zip(*raws, strict=True)]  # type: ignore[operator]
    assert unnormalised.score(sets())[0] == pytest.approx(right)
    assert unnormalised.score(sets())[0] != pytest.approx(scorer.score(sets())[0], abs=1e-3)


def test_it_describes_its_members_and_holds_their_models(folders: list[Path]) -> None:
    scorer = build_scorer(f"sum:0.7*{folders[0]},{folders[1]},3*{LENGTH}@10/2")
    assert scorer.name == (
        f"sum:0.7*reward_model:{folders[0]},reward_model:{folders[1]},3*{LENGTH}@10/2"
    )
    known = json.loads(json.dumps(scorer.describe()))
    assert known["rule"] == "sum" and known["normalized"]
    assert [m["weight"] for m in known["members"]] == [0.7, 1.0, 3.0]
    assert known["members"][0]["normalizer"]["type"] == "RunningMeanStd"
    assert known["members"][2]["scale"] == [10.0, 2.0]
    assert len(list(scorer.model)) == 2 and scorer.window == 256
    # Deviations 2, 0.5 and 2 of the members' raw scores, by weight.
    assert scorer.logits_per_unit == pytest.approx((0.7 * 2 + 0.5 + 3 * 2) / 4.7)
    long = conversation("why", "no " * 300)
    assert not scorer.fits(long, long.candidates[0])
    assert scorer.fits(sets()[0], sets()[0].candidates[0])
    assert scorer.score([long])[0] == [None]


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ("{0},{2}", "rm-2: has no normaliser"),
        ("{0},gold:help_desk", "gold:help_desk: has no normaliser"),
        ("{0}@0/1,{1}", "rm-0: has its own normaliser"),
        ("{0},./nowhere", "nowhere: no such model folder"),
        ("{0},gold:moon", "there is no such world"),
        ("{0}", "two or more members"),
    ],
)
def test_members_that_do_not_fit_together_are_refused(
    members: str, told: str, folders: list[Path]
) -> None:
    with pytest.raises(UserError, match=told):
        build_scorer(f"mean:{members.format(*folders)}")


def test_a_missing_member_is_found_before_weights_are_read(folders: list[Path]) -> None:
    check_scorer(f"mean:{folders[0]},{folders[1]}")
    for wrong, told in (
        ("./nowhere", "no such model folder"),
        (f"{folders[0]}-base", "not a reward model"),
    ):
        with pytest.raises(UserError, match=told):
            check_scorer(f"mean:{folders[0]},{wrong}")


def test_score_writes_it_and_goes_on_only_with_the_same_members(
    folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_candidate_sets(tmp_path / "raw.jsonl", sets()[:1], {})
    name = f"minimum:{folders[0]},{folders[1]}"
    files = [str(tmp_path / "raw.jsonl"), str(tmp_path / "out.jsonl")]
    assert main(["score", *files, "--scorer", name]) == 0
    [row] = read_candidate_sets(tmp_path / "out.jsonl")
    assert row.scores == pytest.approx(build_scorer(name).score(sets()[:1])[0])
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["normalized"] and len(manifest["scorer_details"]["members"]) == 2
    prints = [scorer_fingerprint(str(folder)) for folder in folders]
    assert manifest["settings"]["scorer_fingerprint"] == ",".join(prints[:2])
    other = f"minimum:{folders[1]},{folders[0]}"
    with pytest.raises(UserError, match="scorer"):
        score_file(ScoreConfig(input_file=files[0], output_file=files[1], scorer=other))
    assert (
        main(["score", files[0], f"{tmp_path}/x.jsonl", "--scorer", f"mean:{folders[0]},no"]) == 2
    )
    assert "no: no such model folder" in capsys.readouterr().err


def test_edited_members_are_accepted_as_edited_models_are(
    folders: list[Path], tmp_path: Path
) -> None:
    edited = reward_model_folder(tmp_path / "rm", seed=5, normalizer=RunningMeanStd())
    write_candidate_sets(tmp_path / "raw.jsonl", sets()[:1], {})
    seal_folder(edited)
    (edited / "tokenizer_config.json").open("a").write("\n")
    name = f"mean:{folders[0]},{edited}"
    words = ["score", f"{tmp_path}/raw.jsonl", f"{tmp_path}/out.jsonl", "--scorer", name]
    assert main(words) == 2
    assert main([*words, "--accept_edited_files"]) == 0


def test_a_critic_cannot_start_from_it(folders: list[Path]) -> None:
    name = f"mean:{folders[0]},{folders[1]}"
    assert is_made(name)
    config = PPOConfig("m", "o", train_datasets="p", reward_model_name_or_path=name)
    assert config.share_trunk


def test_ppo_learns_from_it_as_from_its_member(tmp_path: Path) -> None:
    """The mean of a reward model and itself: the same rewards, so the same weights to the bit."""
    world = build_world(tmp_path)
    reward = world / "reward"
    critic = {"reward_critic_model_name_or_path": str(reward)}
    weights = []
    for name, scorer in (("alone", str(reward)), ("twice", f"mean:{reward},{reward}")):
        changes = {**critic, "reward_model_name_or_path": scorer, "num_rollouts": 1}
        ppo.train(settings(world, tmp_path / name, **changes))
        weights.append((tmp_path / name / "policy" / "model.safetensors").read_bytes())
        assert (tmp_path / name / "value").is_dir()
    assert weights[0] == weights[1]
    manifest = json.loads((tmp_path / "twice" / "manifest.json").read_text())
    assert manifest["scorer"].startswith("mean:reward_model:") and manifest["scores_are_normalized"]
