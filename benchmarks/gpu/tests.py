"""The tests in tests/gpu, file by file, through pytest.

On a CPU with `--tiny` their bodies run there (`RRHF_GPU_TESTS_ON_CPU`), so that nothing is found to
be broken only where time is dear.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from benchmarks.gpu.setting import Setting, check, require_package
from benchmarks.harness import ROOT, NotMeasured

ON_CPU = "RRHF_GPU_TESTS_ON_CPU"
FOLDER = ROOT / "tests" / "gpu"


def items(setting: Setting) -> list[str]:
    return sorted(path.name for path in FOLDER.glob("test_*.py"))


def require(item: str, setting: Setting) -> None:
    """Raises NotMeasured where there is no pytest, or no tests."""
    require_package("pytest", "tests/gpu")
    if not FOLDER.is_dir():
        raise NotMeasured("this checkout has no tests/gpu")


def run(item: str, setting: Setting) -> dict[str, Any]:
    require(item, setting)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rs", "-m", "gpu"]
    command += ["-p", "no:cacheprovider", str(FOLDER / item)]
    env = {**os.environ, ON_CPU: "" if setting.on_gpu else "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    counts = {
        word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)
    }
    skips = re.findall(r"^SKIPPED \[\d+\] [^:]+:\d+: (.*)$", done.stdout, re.MULTILINE)
    line = ", ".join(f"{n} {word}" for word, n in counts.items()) or "nothing ran"
    if skips:
        line += f" ({'; '.join(sorted(set(skips)))})"
    passed = done.returncode == 0 and bool(counts)
    failures = "" if passed else done.stdout[-3000:]
    return check(passed, line, counts=counts, failures=failures)
