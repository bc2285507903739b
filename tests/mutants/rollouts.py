"""Faults in rollouts: what is sampled, cut, scored and read."""

from __future__ import annotations

from .apply import Mutant

ROLLOUT = "rrhf/training/online/rollout.py"
LOGPROB_PASS = "rrhf/training/online/logprob_pass.py"
ENDS = "rrhf/training/online/response_ends.py"
REFERENCE = "rrhf/training/core/reference.py"
EVAL_MODE = "rrhf/models/eval_mode.py"
ROLLOUTS = (
    "test_rollout_edges.py",
    "test_logprob_pass.py",
    "test_response_ends.py",
    "test_rollout.py",
)

ROLLOUT_FAULTS = [
    Mutant(
        "a prompt that occurs twice is answered the same twice",
        ROLLOUT,
        "renamed = _with_own_ids(prompts)",
        "renamed = list(prompts)",
        ROLLOUTS,
    ),
    Mutant(
        "a third occurrence is answered like the second",
        ROLLOUT,
        'f"{prompt.id}#{times}"',
        'f"{prompt.id}#again"',
        ROLLOUTS,
    ),
    Mutant(
        "ranks sample from the weights of the start",
        ROLLOUT,
        "self._copy.refresh()",
        "pass",
        ROLLOUTS,
    ),
    Mutant(
        "counts are the first rank's",
        ROLLOUT,
        "for one in parts:",
        "for one in parts[:1]:",
        ROLLOUTS,
    ),
    Mutant(
        "rows stand in the order of ranks",
        ROLLOUT,
        "key=lambda r: (r.prompt, r.sample)",
        "key=lambda r: 0",
        ROLLOUTS,
    ),
    Mutant(
        "a signal drops the rollout of one rank alone",
        ROLLOUT,
        "int(self._parallel.max(self._stop.exit_code))",
        "int(self._stop.exit_code)",
        ROLLOUTS,
    ),
    Mutant(
        "the scorer reads what was cut off",
        ROLLOUT,
        "            text=self._codec.decode_response(prompt, ids),\n",
        "",
        ROLLOUTS,
    ),
    Mutant(
        "a response that was cut still counts as too long",
        ROLLOUT,
        '            finish="stop",\n',
        "",
        ROLLOUTS,
    ),
    Mutant(
        "an EOS behind a loop hides it",
        ROLLOUT,
        "if i not in end_ids]",
        "if True]",
        ROLLOUTS,
    ),
    Mutant(
        "a score of zero is no score",
        ROLLOUT,
        "                if score is not None:",
        "                if score:",
        ROLLOUTS,
    ),
    Mutant(
        "a response that was cut pays for its missing end",
        ROLLOUT,
        "            is_finished=True,\n",
        "",
        ROLLOUTS,
    ),
    Mutant(
        "as many without a score as are allowed stop the run",
        ROLLOUT,
        '> limit * counts["sampled"]',
        '>= limit * counts["sampled"]',
        ROLLOUTS,
    ),
    Mutant(
        "sampling has dropout",
        EVAL_MODE,
        "    model.eval()\n",
        "",
        ROLLOUTS,
    ),
    Mutant(
        "training goes on without dropout after a rollout",
        EVAL_MODE,
        "model.train(was_training)",
        "model.eval()",
        ROLLOUTS,
    ),
    Mutant(
        "a prompt that just fits counts as cut",
        ROLLOUT,
        "is_cut=length > self.room",
        "is_cut=length >= self.room",
        ROLLOUTS,
    ),
    Mutant(
        "every rollout draws the same",
        ROLLOUT,
        "params = self._config.sampling(number)",
        "params = self._config.sampling(0)",
        ROLLOUTS,
    ),
    Mutant(
        "responses without a token are trained on",
        ROLLOUT,
        "kept = [row for row in rows if row.token_ids]",
        "kept = list(rows)",
        ROLLOUTS,
    ),
    Mutant(
        "an evaluation's number of samples is not heeded",
        ROLLOUT,
        "params = replace(params, num_return_sequences=samples_per_prompt)",
        "pass",
        ROLLOUTS,
    ),
    Mutant(
        "the policy with its adapters is its own reference",
        REFERENCE,
        "as_reference(self._policy) as policy:",
        "contextlib.nullcontext(self._policy) as policy:",
        ("test_ppo.py", "test_ppo_layouts.py"),
    ),
    Mutant(
        "engine and trainer agree where the trainer is likelier",
        LOGPROB_PASS,
        ".abs().max())",
        ".max())",
        ROLLOUTS,
    ),
    Mutant(
        "the shortest response is the trial",
        LOGPROB_PASS,
        "key=lambda d: -len(d.token_ids))[:1]",
        "key=lambda d: len(d.token_ids))[:1]",
        ROLLOUTS,
    ),
    Mutant(
        "each rank decides by itself whose log-probs are taken",
        LOGPROB_PASS,
        "gap = self._parallel.max(max(gaps, default=0.0))",
        "gap = max(gaps, default=0.0)",
        ROLLOUTS,
    ),
    Mutant(
        "the trainer's log-probs are computed and not taken",
        LOGPROB_PASS,
        "row.old_logprobs = logprobs[place, tokens].clone()",
        "pass",
        ROLLOUTS,
    ),
    Mutant(
        "a rank with less to read does not join in",
        LOGPROB_PASS,
        "range(int(self._parallel.max(len(batches))))",
        "range(len(batches))",
        ROLLOUTS,
    ),
    Mutant(
        "under bf16 the trainer's log-probs are not taken for granted",
        LOGPROB_PASS,
        "        if self._recompute:\n",
        "        if False:\n",
        ROLLOUTS,
    ),
    Mutant(
        "the first token that may be a stop is passed over",
        ENDS,
        "range(self._after, len(token_ids))",
        "range(self._after + 1, len(token_ids))",
        ROLLOUTS,
    ),
    Mutant(
        "the stop token itself is cut off",
        ENDS,
        "return place + 1",
        "return place",
        ROLLOUTS,
    ),
    Mutant(
        "a response that is nothing but a loop is none",
        ENDS,
        "if needed > len(token_ids):",
        "if needed >= len(token_ids):",
        ROLLOUTS,
    ),
    Mutant(
        "four equal tokens are a loop",
        ENDS,
        "max(LEAST_REPEATS * period, LEAST_TOKENS)",
        "LEAST_REPEATS * period",
        ROLLOUTS,
    ),
    Mutant(
        "a loop of sixteen tokens is none",
        ENDS,
        "range(1, LONGEST_PERIOD + 1)",
        "range(1, LONGEST_PERIOD)",
        ROLLOUTS,
    ),
    Mutant(
        "a stop token with a blank is another token",
        ENDS,
        'found.strip(" ") == wanted',
        "found == wanted",
        ROLLOUTS,
    ),
]
