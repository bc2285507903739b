"""Faults of `--engine vllm`: what a server is asked, given and believed."""

from __future__ import annotations

from .apply import Mutant

SYNC = "rrhf/training/online/weight_sync.py"
ENGINE = "rrhf/generation/vllm/engine.py"
CANARIES = "rrhf/generation/vllm/canaries.py"
SERVER = "rrhf/generation/vllm/server.py"
UNTIED = "rrhf/models/untied.py"
LOOP = "rrhf/training/core/loop.py"
ONLINE, ALONE = ("test_ppo_vllm.py",), ("test_vllm_engine.py",)

VLLM_FAULTS = [
    Mutant(
        "canaries are scored and not compared",
        CANARIES,
        "if not value <= self.bound:",
        "if value != value:",
        ONLINE,
    ),
    Mutant(
        "a server that kept the old weights passes if they are near enough",
        CANARIES,
        "if abs(1 - slope) > max(",
        "if abs(1 - slope) > 9 + max(",
        ("test_canaries.py",),
    ),
    Mutant(
        "nobody looks whether the server still has the weights",
        SYNC,
        "or self._fault_of(self._engine.require_same, on_main=True)",
        "or None",
        ONLINE,
    ),
    Mutant(
        "a restarted server's responses are kept",
        ENGINE,
        "                if self.settings.check_weights:\n                    "
        "self.require_same()\n",
        "                if self.settings.check_weights:\n                    pass\n",
        ALONE,
    ),
    Mutant(
        "a server that failed is believed to have the weights that it had before",
        ENGINE,
        "        self._checked = None  # what failed",
        "        # what failed",
        ALONE,
    ),
    Mutant(
        "the prefix cache is left as it is",
        SERVER,
        'done = self.http.post("/reset_prefix_cache", {}, _QUICK_SECONDS)',
        "done = None",
        ONLINE,
    ),
    Mutant(
        "every round sends the same seeds",
        ENGINE,
        "key = json.dumps([params.seed, params.round, prompt_id])",
        "key = json.dumps([params.seed, prompt_id])",
        ALONE,
    ),
    Mutant(
        "the server is given the policy at temperature 1",
        UNTIED,
        "weights[name] = weights[name] / temperature",
        "weights[name] = weights[name] * 1",
        ("test_vllm_start.py",),
    ),
    Mutant(
        "a folder with something else is replaced by the served copy",
        UNTIED,
        "    if folder.exists() or folder.is_symlink():",
        "    if not folder:",
        ("test_vllm_start.py",),
    ),
    Mutant(
        "an answer that is cut is read as if it were whole",
        "rrhf/generation/vllm/http.py",
        "if answer.length and not is_late.is_set():",
        "if not answer:",
        ALONE,
    ),
    Mutant(
        "a rank that fails leaves the others waiting",
        SYNC,
        "                crash = found\n",
        "                raise\n",
        ("test_weight_sync.py",),
    ),
    Mutant(
        "a server's rounding is taken for weights that it kept",
        CANARIES,
        "max(_SLOPE_BOUND, _SLOPE_ERRORS * float(error))",
        "_SLOPE_BOUND * 0.1",
        ("test_canaries.py",),
    ),
    Mutant(
        "a request that connects while others are ended goes on",
        "rrhf/generation/vllm/http.py",
        "if self._is_closed:",
        "if False:",
        ALONE,
    ),
    Mutant(
        "a run that loses its server keeps no checkpoint",
        LOOP,
        "            if self.step:\n                self._save()\n            raise\n",
        "            raise\n",
        ONLINE,
    ),
    Mutant(
        "a missing choice goes unnoticed",
        SERVER,
        'if set(by_index) != set(wanted) or len(answer["choices"]) != len(wanted):',
        "if not by_index:",
        ALONE,
    ),
]
