"""A scorer that the tests of evaluation share."""

import math

from rrhf.scoring.scorer import Scorer


class ByLength(Scorer):
    """One point a letter; None for a text with "?", NaN for one with "!"."""

    name = "by_length"

    def score(self, sets):
        def of(text):
            return None if "?" in text else math.nan if "!" in text else float(len(text))

        return [[of(c.response) for c in s.candidates] for s in sets]
