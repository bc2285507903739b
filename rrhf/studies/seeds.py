"""Runs the seeds of a study, one after the other or in parallel on several cores.

Each seed uses one thread: at the size of the worlds' models, a second thread only slows it down.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from rrhf.signals import caught_signals

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0

RunSeed = Callable[[int, Callable[[str], None]], Any]
"""Runs one seed; its arguments are the seed and a function that reports progress."""


def seed_folder(folder: Path, seed: int) -> Path:
    """Return the folder that holds the stages of a seed."""
    return folder / f"seed-{seed}"


def run_seeds(
    run: RunSeed, seeds: Sequence[int], jobs: int, say: Callable[[str], None]
) -> list[Any]:
    """Run every seed; return their results in the order of the seeds.

    Args:
        run: runs one seed; must be picklable if seeds run in parallel.
        seeds: the seeds; at least one.
        jobs: number of seeds to run at the same time; 0 = one for each core.
        say: called with lines of progress.
    """
    num_jobs = min(jobs or _num_cores(), len(seeds))
    if num_jobs == 1:
        return [_on_one_thread(run, seed, len(seeds), say) for seed in seeds]
    context = multiprocessing.get_context("spawn")
    done: dict[int, Any] = {}
    with ProcessPoolExecutor(num_jobs, mp_context=context, initializer=_quiet_worker) as pool:
        try:
            with caught_signals() as stop:  # no signal interrupts the start of workers
                waiting = {
                    pool.submit(_on_one_thread, run, seed, len(seeds), _say_line): seed
                    for seed in seeds
                }
            stop.raise_if_received("finished work is kept, and the same command makes the rest")
            while waiting:
                # With a timeout: a signal just before the call would not end an endless wait.
                ended, _ = wait(waiting, _LOOK_SECONDS, FIRST_COMPLETED)
                for future in ended:
                    seed = waiting.pop(future)
                    done[seed] = future.result()
                    say(f"seed {seed} is done ({len(done)} of {len(seeds)})")
        except BaseException:  # end the other seeds at once
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
    return [done[seed] for seed in seeds]


def _on_one_thread(run: RunSeed, seed: int, num_seeds: int, say: Callable[[str], None]) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prefix = f"seed {seed}: " if num_seeds > 1 else ""
    try:
        return run(seed, lambda text: say(prefix + text))
    finally:
        torch.set_num_threads(threads)


def _quiet_worker() -> None:
    """Turn off progress bars, since bars of several processes would overwrite each other, and end
    the worker when the study is killed, so that no stage is still running when the command is
    repeated."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["TQDM_DISABLE"] = "1"
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _say_line(text: str) -> None:
    logger.info(text)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
