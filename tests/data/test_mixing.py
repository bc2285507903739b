"""Mixtures: the grammar, the counts of each proportion, the same rows for the same seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from rrhf.data.candidate_files import CandidateFile
from rrhf.data.mixing import SourceSpec, choose_rows, load_sets, parse_mixture
from rrhf.data.sources import SourceCounts
from rrhf.errors import UserError


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def candidates_file(tmp_path: Path) -> str:
    path = tmp_path / "candidates.jsonl"
    rows = [{"query": f"c{n}", "responses": ["a", "b"], "scores": [1, 2]} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# The grammar.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", SourceSpec("a")),
        ("a:", SourceSpec("a")),
        ("a:0.5", SourceSpec("a", Fraction(1, 2))),
        ("a:.25", SourceSpec("a", Fraction(1, 4))),
        ("a:1e-3", SourceSpec("a", Fraction(1, 1000))),
        ("a:2/3", SourceSpec("a", Fraction(2, 3))),
        ("a:2", SourceSpec("a", Fraction(2))),
        ("a:0", SourceSpec("a", Fraction(0))),
        ("a:1000/-1", SourceSpec("a", None, 1000)),
        ("a:-7", SourceSpec("a", None, 7)),
        ("a:0.5:/x/y.json", SourceSpec("a", Fraction(1, 2), None, "/x/y.json")),
        ("a::/x/y.json", SourceSpec("a", path="/x/y.json")),
        ("a:1:x:y", SourceSpec("a", Fraction(1), None, "x:y")),
    ],
)
def test_one_part(text: str, expected: SourceSpec):
    assert parse_mixture(text) == [expected]


def test_several_parts():
    assert parse_mixture("a:0.5, b ,,c:1/2") == [
        SourceSpec("a", Fraction(1, 2)),
        SourceSpec("b"),
        SourceSpec("c", Fraction(1, 2)),
    ]
    assert parse_mixture(["a,b", "c"]) == [SourceSpec("a"), SourceSpec("b"), SourceSpec("c")]


def test_a_path_that_exists_is_taken_as_it_stands(tmp_path: Path):
    odd = tmp_path / "a,b:0.5; c.json"
    odd.write_text("{}")
    assert parse_mixture(str(odd)) == [SourceSpec(str(odd))]
    assert parse_mixture([str(odd), "x"])[0] == SourceSpec(str(odd))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a:half", "'half' is not a proportion"),
        ("a:1/2/3", "is not a proportion"),
        ("a:nan", "is not a proportion"),
        ("a:inf", "is not a proportion"),
        ("a:1/0", "divides by zero"),
        ("a:-0.5", "must be a whole number"),
        (":0.5", "names no source"),
        ("", "no data named"),
        (",", "no data named"),
    ],
)
def test_what_is_no_mixture(text: str, says: str):
    with pytest.raises(UserError, match=says):
        parse_mixture(text)


# Counts.


def test_rows_are_whole_copies_and_a_draw_without_replacement():
    for size in (1, 3, 10):
        for wanted in (0, 1, 2, 5, 10, 13, 30):
            chosen = choose_rows(size, wanted, "s")
            times = Counter(chosen)
            copies, rest = divmod(wanted, size)
            assert len(chosen) == wanted
            assert all(times[row] in (copies, copies + 1) for row in range(size))
            assert sum(times[row] == copies + 1 for row in range(size)) == rest


def test_a_draw_has_no_favourites():
    times = Counter(row for n in range(2000) for row in choose_rows(10, 3, f"seed {n}"))
    # Binomial(2000, .3): mean 600, deviation 20.5; 5 deviations.
    assert all(abs(times[row] - 600) < 103 for row in range(10))


@pytest.mark.parametrize(
    ("proportion", "rows"),
    [("2/3", 7), ("0.75", 8), ("0.35", 4), ("0.25", 2), ("0.05", 0), ("0.06", 1), ("1.14", 11)],
)
def test_a_share_is_rounded_to_the_nearest_row(proportion: str, rows: int):
    """Of ten: 6.7, 7.5, 3.5, 2.5, .5, .6 and 11.4; halves go to the even number."""
    (spec,) = parse_mixture(f"a:{proportion}")
    assert spec.number_of_rows(10) == rows


def places_of(mixture: str, seed: int = 0) -> list[list[int]]:
    """For each file of the mixture, in order, the numbers of the rows that were drawn."""
    found: dict[str, list[int]] = {}
    for item in load_sets(mixture, seed=seed):
        name, number = item.query.split()
        found.setdefault(name, []).append(int(number))
    return list(found.values())


def test_parts_of_a_mixture_are_drawn_apart(tmp_path: Path):
    """Equal places in all sources would leave the same prompts out of parallel files."""
    for name in ("one", "two"):
        rows = [{"query": f"{name} {n}", "responses": ["a"], "scores": [1]} for n in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    first, second = places_of(f"{one}:0.5,{two}:0.5")
    assert len(first) == len(second) == 30
    # Hypergeometric: 15 in common expected, deviation 2.
    assert 5 < len(set(first) & set(second)) < 25
    (both,) = places_of(f"{one}:0.5,{one}:0.5")  # the same source twice
    assert both[:30] != both[30:] and 5 < len(set(both[:30]) & set(both[30:])) < 25
    assert places_of(f"{one}:0.5,{two}:0.5") == [first, second]
    assert places_of(f"{one}:0.5,{two}:0.5", seed=1)[0] != first
    (tmp_path / "elsewhere").mkdir()
    moved = one.rename(tmp_path / "elsewhere" / "other.jsonl")
    assert places_of(f"{moved}:0.5,{two}:0.5") == [first, second]


def test_rows_of_nothing():
    assert choose_rows(0, 0, "s") == []
    with pytest.raises(UserError, match="a source that has no rows"):
        choose_rows(0, 3, "s")


@pytest.mark.parametrize(
    ("proportion", "rows"),
    [("1", 10), ("0.5", 5), ("1/3", 3), ("2.5", 25), ("4/-1", 4), ("-4", 4), ("25/-1", 25)],
)
@pytest.mark.parametrize("kind", ["pairs_file", "candidates_file"])
def test_proportions(request: pytest.FixtureRequest, kind: str, proportion: str, rows: int):
    found = load_sets(f"{request.getfixturevalue(kind)}:{proportion}", seed=1)
    assert len(found) == rows == len(list(found))
    assert len({s.id for s in found}) == rows
    times = Counter(s.query for s in found)
    assert max(times.values()) - min(times[s.query] for s in found) <= 1


def test_alias_with_proportion_and_path(pairs_file: str):
    found = load_sets(f"hh-harmless:0.5:{pairs_file}", seed=3)
    assert len(found) == 5
    assert {s.origin for s in found} == {"hh-rlhf/harmless-base"}


def test_a_part_of_zero_is_skipped_unread(pairs_file: str):
    assert len(load_sets(f"nowhere/at-all:0,{pairs_file}")) == 10


def test_nothing_left_is_a_mistake(pairs_file: str):
    with pytest.raises(UserError, match="no rows are left"):
        load_sets(f"{pairs_file}:0")
    with pytest.raises(UserError, match="no rows are left"):
        load_sets(f"{pairs_file}:0.01")


def test_the_same_seed_draws_the_same(pairs_file: str, candidates_file: str):
    text = f"{pairs_file}:0.5,{candidates_file}:1.3"
    first = [s.id for s in load_sets(text, seed=1)]
    assert [s.id for s in load_sets(text, seed=1)] == first
    assert any([s.id for s in load_sets(text, seed=n)] != first for n in range(2, 6))


# The sequence.


def test_a_mixture_is_a_sequence_in_order(pairs_file: str, candidates_file: str):
    found = load_sets([candidates_file, f"{pairs_file}:2"])
    assert [s.query for s in found] == [f"c{n}" for n in range(10)] + [
        f"p{n}" for n in range(10)
    ] * 2
    assert found[-1] == list(found)[-1] and found[3:5] == list(found)[3:5]
    assert len({s.id for s in found}) == 30
    order = list(range(30))
    random.Random(0).shuffle(order)
    assert [found[n].id for n in order] == [list(found)[n].id for n in order]
    with pytest.raises(IndexError):
        found[30]


def test_one_candidate_file_is_itself(candidates_file: str):
    counts = SourceCounts()
    found = load_sets(candidates_file, counts=counts)
    assert isinstance(found, CandidateFile) and str(found.path) == candidates_file
    assert (counts.read, counts.kept) == (10, 10)


def test_mistakes_of_any_part_come_before_anything_is_returned(pairs_file: str, tmp_path: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"query": "q", "responses": ["a"], "scores": [NaN]}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl:1: scores\[0\]"):
        load_sets(f"{pairs_file},{bad}")
