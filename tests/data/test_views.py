"""Views: demonstrations, pairs, groups, prompts and parts against slow, plain counting."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from rrhf.data.sources import SourceCounts, read_sets
from rrhf.data.views import (
    demonstrations,
    first_turn,
    pairs,
    prompts,
    ranked_groups,
    split_by_first_turn,
)
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, Candidate, CandidateSet, Message


def scored(name: str, *scores: float | None) -> CandidateSet:
    candidates = tuple(Candidate(f"{name}{n}", "", score) for n, score in enumerate(scores))
    return CandidateSet(name, f"query of {name}", None, candidates)


def marked(name: str, *sources: str) -> CandidateSet:
    candidates = tuple(Candidate(f"{name}:{source}", source) for source in sources)
    return CandidateSet(name, f"query of {name}", None, candidates)


def texts(sets) -> list[list[str]]:
    return [[candidate.response for candidate in item.candidates] for item in sets]


# Demonstrations.


def test_demonstrations_choose_the_mark_then_the_best_then_the_only_one():
    counts = SourceCounts()
    sets = [
        marked("a", REJECTED_SOURCE, CHOSEN_SOURCE, "policy:x"),
        scored("b", 1.0, 3.0, 3.0, None),
        marked("c", "policy:x"),
        marked("d", "policy:x", "policy:x"),
        scored("e"),
    ]
    assert texts(demonstrations(sets, counts)) == [["a:human:chosen"], ["b1"], ["c:policy:x"]]
    assert counts.dropped == {"several_unscored_responses": 1, "no_response": 1}


def test_negative_scores_have_a_best_too():
    assert texts(demonstrations([scored("a", -3.0, -1.0, -2.0)])) == [["a1"]]


# Pairs.


def test_pairs_of_marks_put_the_chosen_first():
    sets = [marked("a", REJECTED_SOURCE, "policy:x", CHOSEN_SOURCE)]
    assert texts(pairs(sets)) == [["a:human:chosen", "a:human:rejected"]]


def test_pairs_of_scores_are_all_strictly_ordered_ones():
    draw = random.Random(0)
    for _ in range(50):
        scores = [draw.choice([None, 0.0, 1.0, 2.0, -1.0]) for _ in range(draw.randrange(7))]
        item = scored("s", *scores)
        expected = Counter()
        for i, j in itertools.permutations(range(len(scores)), 2):
            one, other = scores[i], scores[j]
            if one is not None and other is not None and one > other:
                expected[f"s{i}", f"s{j}"] += 1
        counts = SourceCounts()
        found = pairs([item], counts)
        assert Counter(tuple(names) for names in texts(found)) == expected
        assert counts.dropped == ({} if expected else {"no_ordered_pair": 1})
        assert len({s.id for s in found}) == len(found)


def test_views_of_views():
    sets = [scored(str(n), 1.0, 2.0, 3.0) for n in range(20)]
    part = split_by_first_turn(sets, {"x": 0.5, "y": 0.5})["x"]
    found = pairs(part)
    assert len(found) == 3 * len(part)
    assert found[-1] == list(found)[-1] and found[1:3] == list(found)[1:3]
    with pytest.raises(IndexError):
        found[len(found)]


# Groups.


def test_groups_hold_scored_candidates_alone():
    counts = SourceCounts()
    sets = [
        scored("a", 1.0, None, 2.0),
        scored("b", None, None),
        scored("c", 5.0, 5.0),
        scored("d", 5.0),
        scored("e"),
    ]
    assert texts(ranked_groups(sets, counts)) == [["a0", "a2"], ["c0", "c1"], ["d0"]]
    assert counts.dropped == {"nothing_scored": 2}
    assert counts.mended == {"unscored_candidates_left_out": 1, "all_scores_equal": 1}


def test_an_unscored_pair_is_a_group_of_one_and_zero():
    found = ranked_groups([marked("a", REJECTED_SOURCE, CHOSEN_SOURCE, "policy:x")])
    assert texts(found) == [["a:human:chosen", "a:human:rejected"]]
    assert found[0].scores == (1.0, 0.0)


def half_scored(*scores: float | None) -> CandidateSet:
    sources = (REJECTED_SOURCE, CHOSEN_SOURCE)
    candidates = tuple(
        Candidate(f"{source} {score}", source, score)
        for source, score in zip(sources, scores, strict=True)
    )
    return CandidateSet("h", "q", None, candidates)


def test_of_a_pair_that_is_half_scored_the_score_stands_and_the_marks_order() -> None:
    """The mark is not turned into a score beside the one that is there: scales would be mixed."""
    for scores in ((None, 7.0), (7.0, None)):
        counts = SourceCounts()
        (group,) = ranked_groups([half_scored(*scores)], counts)
        assert group.scores == (7.0,)
        assert counts.mended == {"unscored_candidates_left_out": 1}
        (pair,) = pairs([half_scored(*scores)])
        assert [c.source for c in pair.candidates] == [CHOSEN_SOURCE, REJECTED_SOURCE]
        (shown,) = demonstrations([half_scored(*scores)])
        assert shown.candidates[0].source == CHOSEN_SOURCE
    (group,) = ranked_groups([half_scored(None, None)])
    assert group.scores == (1.0, 0.0)


def test_of_unmarked_replies_that_are_half_scored_no_pair_is_made() -> None:
    counts = SourceCounts()
    assert len(pairs([scored("a", 1.0, None)], counts)) == 0
    assert counts.dropped == {"no_ordered_pair": 1}


# Prompts.


def test_prompts_come_once_and_bare():
    counts = SourceCounts()
    turns = (Message("user", "u"),)
    spoken = CandidateSet("m", "one text", turns, (Candidate("x"),))
    again = CandidateSet("n", "rendered otherwise", turns)
    sets = [scored("a", 1.0), spoken, scored("a", 2.0), again]
    found = prompts(sets, counts=counts)
    assert [s.id for s in found] == ["a", "m"]
    assert all(s.candidates == () for s in found)
    assert counts.dropped == {"repeated_prompt": 2}
    assert len(prompts(sets, unique=False)) == 4


# Parts.


def dialogue(number: int, turns: int, opening: str) -> CandidateSet:
    spoken = [Message("user", opening)]
    for turn in range(turns):
        spoken += [Message("assistant", f"reply {turn}"), Message("user", f"more {number}")]
    return CandidateSet(str(number), f"q{number}", tuple(spoken))


def test_the_first_turn_never_crosses_parts():
    draw = random.Random(0)
    sets = [
        dialogue(
            n, draw.randrange(3), draw.choice(["Hello  %d", "hello %d "]) % draw.randrange(300)
        )
        for n in range(1500)
    ]
    parts = split_by_first_turn(sets, {"reward": 0.4, "policy": 0.4, "heldout": 0.2}, seed=5)
    opened = {name: {first_turn(s) for s in part} for name, part in parts.items()}
    for one, other in itertools.combinations(opened.values(), 2):
        assert not one & other
    assert sorted(int(s.id) for part in parts.values() for s in part) == list(range(1500))
    assert [s.id for s in parts["policy"]] == sorted((s.id for s in parts["policy"]), key=int)
    # 300 first turns: Binomial(300, .4) has deviation 8.5, (300, .2) 6.9; 4 deviations.
    assert abs(len(opened["reward"]) - 120) < 34 and abs(len(opened["heldout"]) - 60) < 28


def test_where_a_first_turn_goes_does_not_depend_on_the_file():
    sets = [dialogue(n, 0, f"opening {n}") for n in range(200)]
    whole = split_by_first_turn(sets, {"a": 0.5, "b": 0.5}, seed=1)
    half = split_by_first_turn(sets[::2], {"a": 0.5, "b": 0.5}, seed=1)
    assert {s.id for s in half["a"]} <= {s.id for s in whole["a"]}
    other = split_by_first_turn(sets, {"a": 0.5, "b": 0.5}, seed=2)
    assert {s.id for s in other["a"]} != {s.id for s in whole["a"]}


def test_the_first_turn_of_a_text():
    text = "\n\nHuman: How  ARE you?\n\nAssistant: Fine\n\nHuman: Good\n\nAssistant:"
    assert first_turn(CandidateSet("x", text)) == "how are you?"
    assert first_turn(CandidateSet("x", "No transcript")) == "no transcript"
    system = (Message("system", "s"), Message("user", "U"))
    assert first_turn(CandidateSet("x", "q", system)) == "u"


def test_fractions_below_one_leave_a_rest():
    sets = [dialogue(n, 0, f"opening {n}") for n in range(400)]
    parts = split_by_first_turn(sets, {"a": 0.25})
    assert abs(len(parts["a"]) - 100) < 35  # Binomial(400, .25): deviation 8.7; 4 deviations
    assert len(split_by_first_turn(sets, {"a": 0.0})["a"]) == 0


@pytest.mark.parametrize("fractions", [{}, {"a": 0.7, "b": 0.4}, {"a": -0.1}, {"a": 1.5}])
def test_fractions_that_are_none(fractions: dict[str, float]):
    with pytest.raises(AssertionError, match="share"):
        split_by_first_turn([], fractions)


def test_parts_of_the_real_file(shared_data: Path):
    sets = list(read_sets(str(shared_data / "hh_harmless_base_test.jsonl.gz")))
    parts = split_by_first_turn(sets, {"reward": 0.4, "policy": 0.4, "heldout": 0.2})
    assert sum(map(len, parts.values())) == len(sets)
    opened = [{first_turn(s) for s in part} for part in parts.values()]
    assert not any(one & other for one, other in itertools.combinations(opened, 2))
    assert len(pairs(parts["heldout"])) == len(parts["heldout"])
