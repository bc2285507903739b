"""One part of the programme in a process of its own: `python -m benchmarks.gpu.child PART SETTING`.

It tells its items, then for each that it was not told to skip when it begins and what came of it,
a line of JSON each, on standard output; all that the parts print goes to standard error. After an
error of CUDA nothing more can be computed in a process: it ends then, and is started again for the
rest.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

from benchmarks.gpu.book import DONE, FAILED, LEFT_OUT
from benchmarks.gpu.parts import load
from benchmarks.gpu.setting import Setting
from benchmarks.harness import NotMeasured

POISONED = 3
"""Exit code after an error of CUDA."""


def die_with_parent() -> None:
    """Have the kernel end this process with the one that started it (Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(part: str, setting: Setting, skipped: list[str]) -> int:
    """Run the items; the exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(**record: Any) -> None:
        print(json.dumps(record), file=answers, flush=True)

    module = load(part)
    items = module.items(setting)
    tell(items=items)
    for item in items:
        if item in skipped:
            continue
        tell(begin=item)
        started = time.monotonic()
        try:
            result = module.run(item, setting)
        except NotMeasured as reason:
            told: dict[str, Any] = {"status": LEFT_OUT, "line": str(reason)}
        except Exception as error:
            traceback.print_exc()
            told = {"status": FAILED, "line": f"{type(error).__name__}: {error}"[:600]}
            told["traceback"] = traceback.format_exc()[-3000:]
        else:
            told = {"status": DONE if result.pop("passed", True) else FAILED, **result}
        tell(item=item, seconds=time.monotonic() - started, **told)
        if _is_poisoned(told.get("line", "")):
            return POISONED
        gc.collect()
        if setting.on_gpu:
            import torch

            torch.cuda.empty_cache()
    return 0


def _is_poisoned(line: str) -> bool:
    words = ("CUDA error", "AcceleratorError", "CUBLAS_STATUS_EXECUTION_FAILED")
    return any(word in line for word in words)


if __name__ == "__main__":
    die_with_parent()
    sys.exit(main(sys.argv[1], Setting.from_json(sys.argv[2]), sys.argv[3:]))
