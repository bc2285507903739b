"""One case in this process, or many, each in a process of its own that gives its memory back.

Every result is written as soon as it is there: a run that was ended goes on with `--resume`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks import harness, registry

NOT_HERE = 2
"""Exit code of a benchmark that cannot be measured on this machine."""


def one_case(
    name: str,
    module: ModuleType,
    case: str,
    rounds: int | None,
    output: Path | None,
    settings: Mapping[str, Any],
) -> int:
    """Measure one case here, print it, write it; the exit code."""
    shape, goal = module.CASES[case], module.GOALS.get(case)
    rounds = rounds or registry.rounds_of(module, case)
    before, started = harness.load(), time.process_time()
    try:
        result = module.run(case, rounds, **settings)
    except harness.NotMeasured as reason:
        result = {"benchmark": name, "case": case, "shape": shape, "not_measured": str(reason)}
        print(f"{name} {case}: not measured: {reason}", flush=True)
    else:
        print(module.table(result), flush=True)
    whole = {"sizes": registry.sizes_of(shape), **result, "goal": goal, "load_before": before}
    whole["cpu_seconds"] = round(time.process_time() - started + harness.children_clock(), 1)
    if output:
        path = path_of(output, name, case)
        harness.write(path, whole)
        if hasattr(module, "picture") and "not_measured" not in result:
            draw(module, path)
    return NOT_HERE if "not_measured" in result else 0


def draw(module: ModuleType, path: Path) -> None:
    """The picture of a result, beside it."""
    try:
        module.picture(json.loads(path.read_text()), path.with_suffix(".png"))
    except harness.NotMeasured as reason:
        print(reason, flush=True)


def path_of(output: Path, name: str, case: str) -> Path:
    """Where a result is written."""
    return output / f"{name}_{case.replace(' ', '_')}.json"


def in_fresh_processes(
    modules: Mapping[str, ModuleType],
    rounds: int | None,
    output: Path | None,
    settings: Mapping[str, str],
    resume: bool = False,
) -> int:
    """Every case of these benchmarks, one after another; 1 where one of them failed."""
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, module in modules.items():
            for case in module.CASES:
                path = path_of(output or Path(scratch), name, case)
                if resume and harness.is_current(path):
                    print(f"{name} {case}: kept", flush=True)
                    continue
                own = {k: v for k, v in settings.items() if k in registry.settings_of(module)}
                command = [sys.executable, "-m", "benchmarks", name, "--case", case]
                command += ["--output", str(path.parent)]
                command += ["--rounds", str(rounds)] if rounds else []
                command += [part for k, v in own.items() for part in (f"--{k}", v)]
                path.unlink(missing_ok=True)
                code = subprocess.run(command, cwd=Path(__file__).parents[1]).returncode
                if code not in (0, NOT_HERE) or not path.exists():
                    failed.append(f"{name} {case}: exit code {code}")
                    told = {"not_measured": f"failed with exit code {code}", "goal": None}
                    harness.write(path, {"benchmark": name, "case": case, **told})
    print(f"{harness.children_clock() / 60:.1f} minutes of CPU time", flush=True)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0
