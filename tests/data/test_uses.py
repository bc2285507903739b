"""What `rrhf data validate` counts."""

from __future__ import annotations

import tracemalloc

from rrhf.data.uses import count_uses
from rrhf.records import plain_prompt


def test_a_count_of_prompts_does_not_hold_them() -> None:
    """`data validate` reads files that do not fit into memory."""
    sets = (plain_prompt(f"{number} {'x' * 1_000_000}") for number in [*range(40), 7])
    tracemalloc.start()
    try:
        found = count_uses(sets)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found["prompts"], found["different_prompts"]) == (41, 40)
    assert peak < 15_000_000
