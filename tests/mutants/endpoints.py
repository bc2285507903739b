"""Faults in the client of servers and in the engine that uses it."""

from __future__ import annotations

from .apply import Mutant

ENDPOINTS = "rrhf/endpoints/"
TESTS = "test_client.py::test_"
CAPS = (TESTS + "caps_are_never_passed_and_hold_over_runs",)
FAULTY = (TESTS + "after_a_fault_the_prompt_is_asked_again_and_answered_once",)

ENDPOINT_FAULTS = [
    Mutant(
        "caps do not count requests that are on their way",
        ENDPOINTS + "budget.py",
        "for one in (self.spent, self.reserved, request):",
        "for one in (self.spent, request):",
        CAPS,
    ),
    Mutant(
        "caps forget what earlier runs spent",
        ENDPOINTS + "client.py",
        "        budget.spent.add(ledger.spent)\n",
        "",
        CAPS,
    ),
    Mutant(
        "a request without outcome counts as free",
        ENDPOINTS + "asking.py",
        "self._budget.settle(bound, attempt.cost or bound)",
        "self._budget.settle(bound, attempt.cost or Spent(1))",
        FAULTY,
    ),
    Mutant(
        "a request that a kill left without outcome counts as free",
        ENDPOINTS + "ledger.py",
        'sent[number] = Spent(1, *row["sent"])',
        "sent[number] = Spent(1)",
        (TESTS + "a_request_without_outcome_counts_at_its_most",),
    ),
    Mutant(
        "any model may answer",
        ENDPOINTS + "replies.py",
        "    if answered == asked or (accepted and answered == accepted):\n",
        "    if answered:\n",
        FAULTY,
    ),
    Mutant(
        "keys stay in what comes back",
        ENDPOINTS + "secrets.py",
        "value = value.replace(key, REPLACEMENT)",
        "pass",
        (TESTS + "keys_in_answers_are_replaced",),
    ),
    Mutant(
        "a slow body has no deadline",
        ENDPOINTS + "server.py",
        "if time.monotonic() > self._deadline:",
        "if False:",
        (TESTS + "what_cannot_pass_ends_the_run_with_one_message",),
    ),
    Mutant(
        "an answer is not written down",
        ENDPOINTS + "ledger.py",
        "        with self._lock:\n            self._append(row)\n",
        "        pass\n",
        (TESTS + "known_answers_cost_nothing_and_a_larger_number_asks_for_the_rest",),
    ),
    Mutant(
        "all requests of a prompt have the same seed",
        ENDPOINTS + "questions.py",
        "json.dumps([seed, prompt, first])",
        "json.dumps([seed, prompt])",
        (TESTS + "fewer_choices_than_asked_are_completed_by_further_requests",),
    ),
    Mutant(
        "responses that were not given stand in the file as empty ones",
        "rrhf/generation/stage.py",
        "            if not sample.failure\n        ]\n        num",
        "        ]\n        num",
        ("test_openai_server.py::test_a_prompt_without_any_response_keeps_its_row",),
    ),
    Mutant(
        "an error in a request's own settings is recorded as a refusal",
        ENDPOINTS + "server.py",
        "    if status not in (400, 413, 422):\n",
        "    if False:\n",
        (TESTS + "what_cannot_pass_ends_the_run_with_one_message",),
    ),
    Mutant(
        "an error drops answers that are on their way",
        ENDPOINTS + "asking.py",
        "patience = latest + limit - time.monotonic()",
        "pass",
        (TESTS + "an_error_waits_for_answers_that_are_on_their_way",),
    ),
    Mutant(
        "a slow request is copied while the other server rests",
        ENDPOINTS + "asking.py",
        "s is not attempt.server and not s.wait(tokens, now)",
        "s is not attempt.server",
        (TESTS + "a_slow_request_is_copied_only_to_another_server_that_is_free_now",),
    ),
    Mutant(
        "what another process wrote to the journal is overlooked",
        "rrhf/stages/journal.py",
        "if self.path.stat().st_size != self._size:",
        "if False:",
        ("test_journal.py::test_what_another_process_wrote_since_it_was_read_is_not_overlooked",),
    ),
]
