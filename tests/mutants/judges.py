"""Faults in judges, in scores over HTTP, and in the correction of win rates."""

from __future__ import annotations

from .apply import Mutant

CORRECTION = "rrhf/report/judge_correction.py"
ADDRESSES, CLIENT = "rrhf/scoring/http/addresses.py", "rrhf/scoring/http/client.py"
SERVER, JUDGE = "rrhf/scoring/http/server.py", "rrhf/scoring/judges/scorer.py"
CORRECTION_TESTS = ("test_judge_correction.py",)
HTTP_TESTS, SERVER_TESTS = ("test_http_scorer.py",), ("test_serve_reward.py",)
JUDGE_TESTS = ("test_judges.py",)

JUDGE_FAULTS = [
    Mutant(
        "the calibration's own error is not in the interval of a corrected win rate",
        CORRECTION,
        "squares - centre * centre) / size",
        "squares - centre * centre) / size * (added > 1)",
        CORRECTION_TESTS,
    ),
    Mutant(
        "specificity is taken for the share of worse items that are judged wrongly",
        CORRECTION,
        "self.better.mean if self.worse is None else 1 - self.worse.mean",
        "self.better.mean if self.worse is None else self.worse.mean",
        CORRECTION_TESTS,
    ),
    Mutant(
        "only the first address of a host is checked",
        ADDRESSES,
        "for text in found:",
        "for text in found[:1]:",
        HTTP_TESTS,
    ),
    Mutant(
        "a host is resolved anew for every request",
        CLIENT,
        "if self._ips is None:",
        "if True:",
        HTTP_TESTS,
    ),
    Mutant(
        "a slow answer may take as long as it likes",
        CLIENT,
        "timer.start()",
        "timer.cancel()",
        HTTP_TESTS,
    ),
    Mutant(
        "a token travels unencrypted",
        CLIENT,
        'if address.scheme == "http" and not address.is_own:',
        "if False:",
        HTTP_TESTS,
    ),
    Mutant(
        "web pages may ask the server for scores",
        SERVER,
        'if self.headers.get("Origin") is not None:',
        "if False:",
        SERVER_TESTS,
    ),
    Mutant(
        "an IPv6 address that stands for an IPv4 one is taken as it is",
        ADDRESSES,
        "return IPv4Address(int(ip) & 0xFFFFFFFF)",
        "return ip",
        HTTP_TESTS,
    ),
    Mutant(
        "an answer is cut before the token in it is replaced",
        CLIENT,
        "return self._redacted_json(answer) if self._token else answer",
        "return answer",
        HTTP_TESTS,
    ),
    Mutant(
        "evaluated prompts may be calibration items",
        "rrhf/report/corrected_wins.py",
        "for prompt in values if prompt in used",
        "for prompt in values if prompt not in values",
        CORRECTION_TESTS,
    ),
    Mutant(
        "pairs are judged in one order only",
        JUDGE,
        "[(s, (a, b)), (s, (b, a))] if a != b",
        "[(s, (a, b)), (s, (a, b))] if a != b",
        JUDGE_TESTS,
    ),
    Mutant(
        "a contradiction under the swap counts as a win",
        JUDGE,
        'if (first, swapped) == ("A", "B"):',
        'if first == "A":',
        JUDGE_TESTS,
    ),
    Mutant(
        "the shown order of a list is forgotten when scores are read",
        JUDGE,
        "zip(order, found or (), strict=False)",
        "zip(sorted(order), found or (), strict=False)",
        JUDGE_TESTS,
    ),
    Mutant(
        "a pair without a verdict is left out of a response's score",
        JUDGE,
        "None if None in one or not one else",
        "None if not one else",
        JUDGE_TESTS,
    ),
]
