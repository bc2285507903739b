"""Faults in the hooks: what they keep, when they act, and what they ask of other ranks."""

from __future__ import annotations

from .apply import Mutant

ONLINE = "rrhf/training/online/"

HOOKS, CONFIG = "rrhf/training/core/hooks.py", "rrhf/training/core/config.py"
AROUND_STEPS, SIGNS = f"{ONLINE}step_hooks.py", f"{ONLINE}no_learning.py"
WATCH, TABLE = "rrhf/training/methods/score_watch.py", f"{ONLINE}sample_table.py"

KEPT = ("test_hooks.py",)
STEPS = ("test_ppo_stream.py",)
SEEN = ("test_no_learning.py",)

HOOK_FAULTS = [
    Mutant(
        "what version 0.1 kept next to its stream's state is not found",
        HOOKS,
        'else [state, state.get("stream", {})]',
        'else [state.get("stream", {})]',
        KEPT,
    ),
    Mutant(
        "what version 0.1 kept in its stream's state is not found",
        HOOKS,
        'else [state, state.get("stream", {})]',
        "else [state]",
        KEPT,
    ),
    Mutant(
        "a hook that is new takes what happens to have its name",
        HOOKS,
        'places = [state["hooks"]] if "hooks" in state else [state, state.get("stream", {})]',
        'places = [state.get("hooks", {}), state, state.get("stream", {})]',
        KEPT,
    ),
    Mutant(
        "a hook that is new does not hear of it",
        HOOKS,
        "        for name, hook in self._named.items():\n            hook.load_state_dict(",
        "        for name, hook in self._named.items():\n"
        "            if any(name in place for place in places):\n"
        "              hook.load_state_dict(",
        KEPT,
    ),
    Mutant(
        "tensors of hooks stay among the stream's",
        HOOKS,
        "left.pop(key) for key in keys",
        "left[key] for key in keys",
        KEPT,
    ),
    Mutant(
        "a hook takes the tensors of one whose name begins with its own",
        HOOKS,
        'if key.startswith(f"{name}.")',
        "if key.startswith(name)",
        KEPT,
    ),
    Mutant(
        "what hooks add to a row is the last one's",
        HOOKS,
        "for hook in self._all for name, value in hook.metrics().items()",
        "for hook in self._all[-1:] for name, value in hook.metrics().items()",
        KEPT,
    ),
    Mutant(
        "two hooks share a name",
        HOOKS,
        "assert len(self._named) == sum(bool(hook.name) for hook in hooks)",
        "assert len(self._named) >= 0",
        KEPT,
    ),
    Mutant(
        "the critic's warm-up lasts a step longer",
        CONFIG,
        "return steps_done < self.frozen_steps",
        "return steps_done <= self.frozen_steps",
        STEPS,
    ),
    Mutant(
        "the objective's warm-up ends a step early",
        AROUND_STEPS,
        "self._config.is_warm_up(step - 1)",
        "self._config.is_warm_up(step)",
        STEPS,
    ),
    Mutant(
        "the policy moves in the critic's warm-up",
        "rrhf/training/core/optim.py",
        "0.0 if group.is_frozen(steps_done) else factor(steps_done)",
        "factor(steps_done)",
        ("test_optim.py", "test_ppo.py"),
    ),
    Mutant(
        "the largest ratio is this rank's",
        AROUND_STEPS,
        "self._parallel.max(self._objective.take_largest_ratio())",
        "self._objective.take_largest_ratio()",
        STEPS,
    ),
    Mutant(
        "without a target rollouts end early",
        AROUND_STEPS,
        "if not self._target_kl or not rest or",
        "if not rest or",
        STEPS,
    ),
    Mutant(
        "a rollout without a step left counts as cut",
        AROUND_STEPS,
        "if not self._target_kl or not rest or",
        "if not self._target_kl or",
        STEPS,
    ),
    Mutant(
        "skipped steps are not counted",
        AROUND_STEPS,
        "self.steps_skipped += rest",
        "self.steps_skipped += 1",
        STEPS,
    ),
    Mutant(
        "a critic that learns alone is given no time",
        SIGNS,
        "            and not self._config.is_warm_up(rollout.steps_done),",
        "            and True,",
        SEEN,
    ),
    Mutant(
        "a sign of some rollouts is taken for one of all",
        SIGNS,
        "if times and times == rollouts:",
        "if times:",
        SEEN,
    ),
    Mutant(
        "what signs were seen is forgotten on resuming",
        SIGNS,
        'self._in_a_row |= state.get("in_a_row", {})',
        "pass",
        SEEN,
    ),
    Mutant(
        "the figure of the last rollout is lost in a stop",
        SIGNS,
        "        self._last = last\n",
        "",
        SEEN,
    ),
    Mutant(
        "a normaliser of another type is taken up",
        WATCH,
        'if saved["type"] != self.state_dict()["type"]:',
        "if False:",
        (*KEPT, "test_reward_training.py"),
    ),
    Mutant(
        "no normaliser, as version 0.1 wrote it, is the beginning",
        WATCH,
        "if state == {}:",
        "if not state:",
        KEPT,
    ),
    Mutant(
        "a normaliser begins anew on resuming",
        WATCH,
        "self.normalizer = normalizer_from_state(saved)",
        "pass",
        KEPT,
    ),
    Mutant(
        "a normaliser sees the scores of one rank",
        WATCH,
        "squared = parallel.sum(torch.tensor([spread], dtype=torch.float64))",
        "squared = torch.tensor([spread], dtype=torch.float64)",
        ("test_reward_training.py",),
    ),
    Mutant(
        "rows of undone steps stay in the table of samples",
        TABLE,
        'self._log.truncate_to(state.get("offset", 0))',
        "pass",
        ("test_sample_table.py",),
    ),
    Mutant(
        "a tracker gets no table",
        TABLE,
        "        self._tracker = tracker\n",
        "        pass\n",
        ("test_sample_table.py",),
    ),
]
