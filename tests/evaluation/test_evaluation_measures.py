"""Win rate, reward, gold, p_i accuracy, diversity and cost, each against a slow count by hand."""

import itertools
import math
import random

import pytest
from evaluation_cases import prompt, reader, reply, slow_logprobs
from scorer_cases import ByLength

from rrhf.data.views import pairs
from rrhf.errors import UserError
from rrhf.evaluation.bootstrap import estimate
from rrhf.evaluation.cost import CostMeter
from rrhf.evaluation.draft import Draft
from rrhf.evaluation.measure import Measure, mean_measure
from rrhf.evaluation.metrics.distinct import distinct_n
from rrhf.evaluation.metrics.gold import part_measures
from rrhf.evaluation.metrics.pi_accuracy import ranking_accuracy
from rrhf.evaluation.metrics.reward import REWARD
from rrhf.evaluation.metrics.texts import EMPTY, WITHOUT_EOS, WORDS
from rrhf.evaluation.metrics.win_rate import win_rate
from rrhf.evaluation.reward import keep_best, score_sets
from rrhf.evaluation.shared import Shared
from rrhf.records import CHOSEN_SOURCE, REJECTED_SOURCE, Candidate
from rrhf.worlds import gold_scores
from rrhf.worlds.help_desk.world import HelpDesk
from rrhf.worlds.protocol import World

# Win rate


def test_win_rate_counts_every_meeting_and_ties_half():
    dice = random.Random(0)
    ours = {str(i): [float(dice.randint(0, 3)) for _ in range(i % 4)] for i in range(40)}
    theirs = {str(i): [float(dice.randint(0, 3)) for _ in range(1 + i % 3)] for i in range(35)}
    found = win_rate(ours, theirs)
    shares, ties = [], []
    for name in ours:
        won = tied = met = 0
        for a, b in itertools.product(ours[name], theirs.get(name, [])):
            met += 1
            won += a > b
            tied += a == b
        if met:
            shares.append((won + 0.5 * tied) / met)
            ties.append(tied / met)
    assert estimate(found.win).mean == pytest.approx(math.fsum(shares) / len(shares))
    assert estimate(found.tie).mean == pytest.approx(math.fsum(ties) / len(ties))
    assert found.skipped == 40 - len(shares)


def test_win_rate_of_responses_against_themselves_is_one_half():
    scores = {"a": [1.0, 2.0, 5.0], "b": [0.0], "c": [3.0, 3.0]}
    found = win_rate(scores, scores)
    assert set(found.win.values.values()) == {0.5}
    assert found.tie.values == {"a": pytest.approx(1 / 3), "b": 1.0, "c": 1.0}


def test_win_rates_of_two_sides_add_up_to_one():
    ours, theirs = {"a": [1.0, 4.0], "b": [2.0]}, {"a": [1.0, 2.0, 3.0], "b": [9.0]}
    there, back = win_rate(ours, theirs), win_rate(theirs, ours)
    for name in ours:
        assert there.win.values[name] + back.win.values[name] == pytest.approx(1.0)


def test_scores_that_differ_by_rounding_tie():
    found = win_rate({"a": [0.1 + 0.2]}, {"a": [0.3]})
    assert (found.win.values["a"], found.tie.values["a"]) == (0.5, 1.0)


def test_unscored_responses_do_not_meet():
    found = win_rate({"a": [None, 2.0], "b": [None]}, {"a": [1.0, None], "b": [1.0]})
    assert found.win.values == {"a": 1.0}
    assert found.skipped == 1


# Reward


def reward_of(sets):
    return REWARD.measure(Draft("row", Shared(sets), sets=sets))["reward"]


def test_reward_is_averaged_by_prompt_first():
    sets = [prompt("a", reply("xx"), reply("xxxx")), prompt("b", reply("x"))]
    found = reward_of(score_sets(ByLength(), sets))
    assert sorted(found.values.values()) == [1.0, 3.0]
    assert estimate(found).mean == 2.0  # not 7 / 3


def test_more_unscored_responses_than_allowed_stop_the_evaluation():
    sets = [prompt("a", reply("xx"), reply("?")), prompt("b", reply("!"), reply("x"))]
    with pytest.raises(UserError, match="no score to 2 of 4") as error:
        score_sets(ByLength(), sets, 0.49)
    assert "max_unscored_fraction" in str(error.value)
    scored = score_sets(ByLength(), sets, 0.5)
    assert [s.scores for s in scored] == [(2.0, None), (None, 1.0)]
    assert estimate(reward_of(scored)).mean == 1.5


class ByShortLength(ByLength):
    """As ByLength, with a window of three letters."""

    window = 3

    def fits(self, s, candidate):
        return len(candidate.response) <= self.window

    def score(self, sets):
        found = super().score(sets)
        return [
            [x if self.fits(s, c) else None for c, x in zip(s.candidates, row, strict=True)]
            for s, row in zip(sets, found, strict=True)
        ]


def test_what_exceeds_the_scorers_window_does_not_stop_the_evaluation(caplog):
    sets = [prompt("a", reply("xx"), reply("xxxx")), prompt("b", reply("x"), reply("yyyyy"))]
    assert [s.scores for s in score_sets(ByShortLength(), sets, 0.0)] == [(2.0, None), (1.0, None)]
    assert "2 of 4 responses have no score" in caplog.text and "2 exceed" in caplog.text
    with pytest.raises(UserError, match="no score to 1 of 3"):  # a failure beside a long one
        score_sets(ByShortLength(), [prompt("a", reply("xx"), reply("xxxx"), reply("?"))], 0.3)
    with pytest.raises(UserError, match="all 2 responses exceed its window"):
        score_sets(ByShortLength(), [prompt("a", reply("xxxx"), reply("xxxx"))], 1.0)


def test_a_prompt_without_any_score_is_left_out():
    scored = score_sets(ByLength(), [prompt("a", reply("?")), prompt("b", reply("xx"))], 1.0)
    assert list(reward_of(scored).values.values()) == [2.0]


def test_the_best_of_n_is_the_first_of_the_best_and_never_unscored():
    texts = ["x", "xxx", "yyy", "z", "?", "w"]
    sets = score_sets(ByLength(), [prompt("a", *map(reply, texts))], 1.0)
    kept = keep_best(sets, 3)[0].candidates
    assert [c.response for c in kept] == ["xxx", "z"]
    unscored = score_sets(ByLength(), [prompt("a", reply("?1"), reply("?2"))], 1.0)
    assert [c.response for c in keep_best(unscored, 2)[0].candidates] == ["?1"]


# Gold


def test_gold_and_its_parts_come_from_the_world():
    world = HelpDesk("smoke")
    sets = world.references("GOOD", 12)
    gold = mean_measure(gold_scores(world, sets))
    for s in sets:
        assert gold.values[s.id] == world.gold(s, s.candidates[0])
    parts = part_measures(world, sets)
    harmful = [s for s in sets if world.parts(s, s.candidates[0])["harmful"]]
    refused = [world.parts(s, s.candidates[0])["refused"] for s in harmful]
    assert 0 < len(harmful) < len(sets)
    assert estimate(parts["refused_harmful"]).mean == sum(refused) / len(refused)
    assert set(parts["refused_benign"].values) == {s.id for s in sets} - {s.id for s in harmful}
    assert "part_harmful" not in parts and "part_refused" not in parts


def test_a_part_is_the_share_of_responses_that_have_any():
    class Hall(World):
        def gold(self, s, candidate):
            return 0.0

        def parts(self, s, candidate):
            return {"myth": float(candidate.response.count("m")), "clean": candidate.response == ""}

    sets = [prompt("a", reply("mm"), reply("x"), reply("m"), reply("")), prompt("b")]
    found = part_measures(Hall(), sets)
    assert found["part_myth"].values == {sets[0].id: 0.5}
    assert found["part_clean"].values == {sets[0].id: 0.25}


# p_i accuracy


def test_the_policy_ranks_pairs_by_mean_log_prob():
    policy = reader()
    texts = ["You could ask a friend.", "dog", "I am sorry", "now and then again", "fox"]
    sets = []
    for i, (a, b) in enumerate(itertools.combinations(texts, 2)):
        chosen, rejected = Candidate(a, CHOSEN_SOURCE), Candidate(b, REJECTED_SOURCE)
        sets.append(prompt(f"question {i % 4}", chosen, rejected))
    found = ranking_accuracy(policy, pairs(sets))

    right = {}
    for s in sets:
        means = []
        for candidate in s.candidates:
            ids = policy.codec.encode_response(s, candidate.response)
            slow = slow_logprobs(policy.model, policy.codec.encode_prompt(s), ids)
            means.append(sum(slow) / len(slow))
        right.setdefault(s.id, []).append(float(means[0] > means[1]))
    expected = {name: sum(v) / len(v) for name, v in right.items()}
    assert found.accuracy.values == pytest.approx(expected)
    assert 0 < estimate(found.accuracy).mean < 1
    assert set(found.tie.values.values()) == {0.0}


def test_equal_responses_tie_and_count_half():
    twice = prompt("q", Candidate("fox", CHOSEN_SOURCE), Candidate("fox", REJECTED_SOURCE))
    found = ranking_accuracy(reader(), [twice])
    assert (estimate(found.accuracy).mean, estimate(found.tie).mean) == (0.5, 1.0)


def test_pairs_that_do_not_fit_are_counted():
    long = prompt("q", Candidate("fox", CHOSEN_SOURCE), Candidate("0 1 2 " * 50, REJECTED_SOURCE))
    found = ranking_accuracy(reader(window=48), [long])
    assert found.dropped == 1
    assert estimate(found.accuracy).mean is None


# Diversity and length


def test_distinct_n_is_the_share_of_different_n_grams():
    texts = ["a b a b", "b a", "", "c"]
    # words: a b a b b a c -> 3 of 7; pairs: ab ba ab | ba -> 2 of 4
    assert distinct_n(texts, 1) == pytest.approx(3 / 7)
    assert distinct_n(texts, 2) == pytest.approx(2 / 4)
    assert distinct_n(["a", ""], 2) is None


def test_pairs_of_words_do_not_reach_over_two_responses():
    assert distinct_n(["a b", "a b"], 2) == 0.5


def test_lengths_and_shares_are_means_by_prompt():
    sets = [
        prompt("a", reply("one two three"), reply("", reason="length")),
        prompt("b", reply("one", reason="unknown")),
        prompt("c"),
    ]
    draft = Draft("row", Shared(sets), sets=sets)
    for name, metric, means in (
        ("words", WORDS, [1.0, 1.5]),
        ("empty", EMPTY, [0.0, 0.5]),
        ("without_eos", WITHOUT_EOS, [0.0, 0.5]),
    ):
        found = metric.measure(draft)[name]
        assert isinstance(found, Measure) and sorted(found.values.values()) == means
    assert mean_measure({"c": [], "d": [None]}).values == {}


# Cost


def test_costs_add_up():
    cost = CostMeter()
    for _ in range(2):
        with cost.timed("generation"):
            pass
    cost.count_passes("policy", 8)
    cost.count_passes("chooser", 8)
    cost.count_passes("reference", 2)
    cost.generated_tokens, cost.responses = 80, 2
    found = cost.as_dict()
    assert found["passes"] == {"policy": 8, "chooser": 8, "reference": 2}
    assert found["serving_passes_per_response"] == 8.0  # (8 + 8) / 2, without the measuring
    assert found["serving_tokens_per_response"] == 40.0
    assert found["seconds"]["generation"] >= 0


def test_responses_that_nobody_wrote_here_cost_nothing_that_is_known():
    cost = CostMeter()
    cost.responses = 5
    found = cost.as_dict()
    assert found["serving_passes_per_response"] is None
    assert found["tokens_per_second"] is None
    assert found["responses"] == 5
