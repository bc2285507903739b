"""Win rates by a pairwise judge on an embedded world, and their correction to the truth."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_cases import error_of
from scripted_judge import Unwired, answering, imperfect, shown, texts_of
from scripted_server import ScriptedServer

from rrhf.cli.main import main
from rrhf.data.candidate_files import write_candidate_sets
from rrhf.records import CandidateSet
from rrhf.scoring.judges import session
from rrhf.worlds import gold_of, make_world

SENSITIVITY, SPECIFICITY, FIRST = 0.92, 0.7, 0.2
PROMPTS = 400
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant:"


SCORER = "judge:pairwise#model=m#base_url=http://127.0.0.1:9/v1"


def unwire(monkeypatch: pytest.MonkeyPatch, judge: ScriptedServer) -> ScriptedServer:
    """Hundreds of requests over HTTP would take half a minute; test_judges.py sends them."""
    monkeypatch.setattr(session, "Client", Unwired(judge))
    return judge


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger lies in the working directory."""
    monkeypatch.chdir(tmp_path)


class Duel:
    """Two responses to each prompt of the help desk: ours, which is better in 30 % of the prompts,
    and the opponent's."""

    def __init__(self) -> None:
        world = make_world("help_desk")
        draws = random.Random(5)
        self.sets: list[CandidateSet] = []
        self.worths: dict[tuple[str, str], float] = {}
        self.ours: set[tuple[str, str]] = set()
        seen: set[str] = set()
        for s in world.pairs("train"):
            low, high = sorted(s.candidates, key=lambda c: gold_of(world, s, c))
            worths = [gold_of(world, s, c) for c in (low, high)]
            shown_as = said(s)
            if len(s.messages) > 1 or shown_as in seen or worths[0] == worths[1]:
                continue
            ours, theirs = (high, low) if draws.random() < 0.3 else (low, high)
            self.worths |= {
                (shown_as, low.response): worths[0],
                (shown_as, high.response): worths[1],
            }
            self.ours.add((shown_as, ours.response))
            seen.add(shown_as)
            self.sets.append(replace(s, candidates=(ours, theirs)))
        assert len(self.sets) >= PROMPTS
        del self.sets[PROMPTS:]

    def judge(self, sensitivity: float, specificity: float, first: float) -> ScriptedServer:
        return imperfect(
            lambda *shown: self.worths.get(shown, 0.0),
            sensitivity,
            specificity,
            first,
            lambda *shown: shown in self.ours,
        )

    def write(self, name: str, part: slice) -> dict[str, str]:
        """Write prompts and each side's responses of some prompts; returns the files by kind."""
        files = {}
        for kind, places in (("prompts", ()), ("ours", (0,)), ("theirs", (1,))):
            sets = [
                replace(s, candidates=tuple(s.candidates[place] for place in places))
                for s in self.sets[part]
            ]
            files[kind] = f"{name}-{kind}.jsonl"
            write_candidate_sets(Path(files[kind]), sets, {})
        return files


def evaluated(files: dict[str, str], name: str, scorer: str, *more: str) -> dict[str, Any]:
    words = ["evaluate", "--responses", files["ours"], "--baseline", files["theirs"]]
    words += ["--prompts", files["prompts"], "--scorer", scorer, "--name", name]
    assert main([*words, "--output_dir", name, "--gold", "help_desk", *more]) == 0
    return json.loads(Path(name, f"{name}.json").read_text())


def test_a_judge_of_known_mistakes_is_corrected_to_the_truth(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The control: the judge's own win rate is far from the truth, and so is its interval."""
    duel = Duel()
    judge = unwire(monkeypatch, duel.judge(SENSITIVITY, SPECIFICITY, FIRST))
    known = evaluated(duel.write("known", slice(0, 200)), "known", SCORER)
    row = evaluated(duel.write("new", slice(200, None)), "new", SCORER)
    asked = texts_of(judge.bodies)
    # Each pair in both orders; the example at the start and after it, which a ledger would know.
    assert (len(set(asked)), len(asked)) == (2 * PROMPTS + 1, 2 * PROMPTS + 4)
    truth, judged = row["metrics"]["win_gold"]["mean"], row["metrics"]["win_reward"]
    assert 0.2 < truth < 0.4 and "reward" not in row["metrics"]
    assert abs(row["metrics"]["tie_reward"]["mean"] - FIRST) < 0.06
    assert judged["low"] > truth + 0.05

    words = ["compare", "new/new.json", "--judge_calibration", "known/known.json"]
    assert main(words) == 0
    told = capsys.readouterr().out
    found = re.search(r"new +([\d.]+) +([\d.]+) \[([\d.]+), ([\d.]+)\]\n", told)
    plain, corrected, low, high = map(float, found.groups())
    assert plain == pytest.approx(judged["mean"], abs=0.006)
    assert low <= truth <= high and abs(corrected - truth) < 0.1
    rates = [float(x) for x in re.findall(r"(?:sensitivity|specificity) ([\d.]+)", told)]
    want = [FIRST / 2 + (1 - FIRST) * rate for rate in (SENSITIVITY, SPECIFICITY)]
    assert rates == pytest.approx(want, abs=0.08)  # 3 standard errors of 105 items
    assert known["made_with"]["scorer"] == "judge:pairwise:m"


def test_agreement_with_gold_is_measured_by_evaluate_reward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Right in 92 % of the pairs: 80 % are decided, so (.8 * .92 + .2 / 2) = .836 of the pairs."""
    duel = Duel()
    sets = [
        replace(
            s,
            candidates=tuple(
                replace(c, score=duel.worths[said(s), c.response]) for c in s.candidates
            ),
        )
        for s in duel.sets[:300]
    ]
    write_candidate_sets(Path("gold.jsonl"), sets, {})
    unwire(monkeypatch, duel.judge(0.92, 0.92, FIRST))
    words = ["evaluate-reward", "--data_path", "gold.jsonl", "--output_dir", "rows"]
    assert main([*words, "--scorers", SCORER]) == 0
    row = json.loads(Path("rows/judge_pairwise_m.json").read_text())
    accuracy = row["metrics"]["accuracy"]
    assert accuracy["low"] <= 0.836 <= accuracy["high"]
    assert row["scorer"]["answers"] == {"parsed": 600}


def said(s: CandidateSet) -> str:
    return f"user: {s.query.removeprefix(HUMAN).removesuffix(ASSISTANT)}"


def test_comparisons_without_a_verdict_are_left_out_counted_and_limited(
    capsys: pytest.CaptureFixture[str],
) -> None:
    duel = Duel()
    files = duel.write("some", slice(0, 20))
    silent = duel.sets[3].candidates[0].response

    def answer(body: dict[str, Any], number: int) -> str:
        replies = shown(texts_of([body])[0])[1]
        return "?" if silent in replies else json.dumps({"better": "A"})

    with ScriptedServer(answer=answer).running() as server:
        scorer = f"judge:pairwise#model=m#base_url={server.url}"
        row = evaluated(files, "some", scorer, "--max_unscored_fraction", "0.1")
        assert row["metrics"]["win_reward"]["n"] == 19
        assert row["counts"]["comparisons_without_verdict"] == 1
        capsys.readouterr()
        words = ["evaluate", "--responses", files["ours"], "--baseline", files["theirs"]]
        words += ["--prompts", files["prompts"], "--scorer", scorer, "--output_dir", "o"]
        assert main([*words, "--name", "a"]) == 2
        assert "gave no score to 2 of 40 responses" in capsys.readouterr().err


def test_a_mean_of_scores_that_compare_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    duel = Duel()
    files = duel.write("few", slice(0, 3))
    with answering({"better": "A"}).running() as server:
        scorer = f"judge:pairwise#model=m#base_url={server.url}"
        words = ["evaluate", "--responses", files["ours"], "--prompts", files["prompts"]]
        words += ["--scorer", scorer, "--output_dir", "o", "--name", "a", "--metrics", "reward"]
        assert "leave out reward" in error_of(capsys, *words)
