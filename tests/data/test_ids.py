"""Ids in little memory behave as those in a dictionary and a list do."""

from __future__ import annotations

import random
import tracemalloc

from rrhf.data.ids import IdTable, SeenIds
from rrhf.records import CandidateSet, set_id

ODD = ["", "x", "0" * 16, "F" * 16, "f" * 16, "0x" + "1" * 14, "1_" + "2" * 14, " " * 16, "é" * 16]


def test_a_table_numbers_ids_as_a_dictionary_does() -> None:
    draw = random.Random(0)
    ids = ODD + [set_id(str(draw.randrange(3000))) for _ in range(9000)]
    draw.shuffle(ids)
    numbers: dict[str, int] = {}
    table = IdTable()
    for one in ids:
        assert table.find(one) == numbers.get(one)
        assert table.add(one) == (one not in numbers)
        numbers.setdefault(one, len(numbers))
        assert len(table) == len(numbers)
    assert all(table.find(one) == number for one, number in numbers.items())
    assert "another" not in table and set_id("another") not in table


def test_repeats_are_numbered_as_ever() -> None:
    times: dict[str, int] = {}
    draw, given = random.Random(1), []
    ids = SeenIds()
    for _ in range(3000):
        base = draw.choice(["a", "b", "a-1", "a-2", str(draw.randrange(200))])
        if base not in times:
            times[base], fresh = 1, base
        else:
            number = times[base]
            while f"{base}-{number}" in times:
                number += 1
            fresh = f"{base}-{number}"
            times[base], times[fresh] = number + 1, 1
        given.append(fresh)
        assert ids.give(CandidateSet(base, "q")).id == fresh
    assert len(set(given)) == len(given) == len(ids)


def test_a_row_takes_tens_of_bytes() -> None:
    rows = 20_000
    texts = [set_id(str(n)) for n in range(rows)]
    tracemalloc.start()
    seen = IdTable()
    for one in texts:
        seen.add(one)
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 40 * rows, used / rows
