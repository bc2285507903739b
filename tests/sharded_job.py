"""Whole trainings on two gloo ranks under each launch, at the price of one import.

`Launcher` starts one process that imports torch and the trainers once. For each launch it forks the
ranks, in the environment that `accelerate launch` makes of the files in configs/; a rank does its
jobs one after the other and writes down what they came to. Ranks that hang are killed, and said so.

Two switches let launches run here that want GPUs. Both are for tests alone: accelerate's FSDP2 is
told that it may work on CPUs, and DeepSpeed does without its operator for shared memory, which it
would compile for minutes; its collectives then go through gloo like everybody's.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from places import ROOT, TESTS

CONFIGS = ROOT / "configs"
ENGINES = ("one", "ddp", "fsdp2", "zero2", "zero3")


def environment_of(launch: str) -> dict[str, str]:
    """What `accelerate launch` hands to each rank for the launch's file in configs/."""
    if launch == "fsdp2":
        settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
        return {"ACCELERATE_USE_FSDP": "true"} | {
            name.upper(): str(value) for name, value in settings.items()
        }
    if launch.startswith("zero"):
        file = CONFIGS / f"deepspeed_{launch}.json"
        return {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        }
    return {}


class Launcher:
    """A parent of ranks.

    Args:
        job: "module:function" below tests/; called in each rank with (rank, launch, arguments).
    """

    def __init__(self, job: str) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def run(
        self, launch: str, arguments: dict[str, Any], timeout_seconds: float = 150
    ) -> list[dict[str, Any]]:
        """What each rank's job returned.

        Raises:
            AssertionError: a rank failed, or had not come to its end in time.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"launch": launch, "arguments": arguments, "timeout": timeout_seconds}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("ANSWER "):
                answers = json.loads(line.removeprefix("ANSWER "))
                problems = [answer["problem"] for answer in answers if answer["problem"]]
                assert not problems, "\n".join(problems)
                return [answer["result"] for answer in answers]
        raise AssertionError("the parent of the ranks died; its message is above")

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def allow_fsdp_on_cpu() -> None:
    """accelerate asks for FSDP only where it sees accelerators; its FSDP2 works without."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            for state in (PartialState, AcceleratorState):
                state._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state["fsdp_plugin"] = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def do_without_compiled_operators() -> None:
    import deepspeed

    # Not `deepspeed.comm.torch`, which is torch.
    sys.modules[f"{deepspeed.__name__}.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]


def _rank(rank: int, count: int, port: int, order: dict[str, Any], job: Any, pipe: int) -> None:
    """In the child: the job, and its answer into the pipe."""
    answer: dict[str, Any] = {"result": None, "problem": None}
    faulthandler.dump_traceback_later(0.9 * order["timeout"])  # says where it hangs
    try:
        os.environ.update(environment_of(order["launch"]))
        if order["launch"] != "one":
            places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            os.environ |= {name: str(value) for name, value in places.items()}
            os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        if order["launch"] == "fsdp2":
            allow_fsdp_on_cpu()
        if order["launch"].startswith("zero"):
            do_without_compiled_operators()
        answer["result"] = job(rank, order["launch"], order["arguments"])
    except BaseException:
        answer["problem"] = f"rank {rank} of {order['launch']}:\n{traceback.format_exc()}"
    with os.fdopen(pipe, "w") as file:
        json.dump(answer, file)
    os._exit(0)


def _run_ranks(order: dict[str, Any], job: Any) -> list[dict[str, Any]]:
    """Their port is held until they are gone: nobody else can be given it, and the first rank may
    listen on it, because both sides reuse addresses and this one does not listen."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        return _run_ranks_at(held.getsockname()[1], order, job)


def _run_ranks_at(port: int, order: dict[str, Any], job: Any) -> list[dict[str, Any]]:
    count = 1 if order["launch"] == "one" else 2
    children = []
    for rank in range(count):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            os.dup2(2, 1)  # what FSDP and DeepSpeed print is not an answer
            _rank(rank, count, port, order, job, write)
        os.close(write)
        children.append((child, read))
    end = time.monotonic() + order["timeout"]
    living = {child for child, _ in children}
    while living and time.monotonic() < end:
        for child in list(living):
            if os.waitpid(child, os.WNOHANG)[0]:
                living.remove(child)
        time.sleep(0.05)
    for child in living:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    answers = []
    for rank, (child, read) in enumerate(children):
        with os.fdopen(read) as file:
            text = file.read()
        if child in living:
            problem = f"rank {rank} of {order['launch']} hung for {order['timeout']:.0f} s"
            answers.append({"result": None, "problem": problem})
        else:
            answers.append(json.loads(text))
    return answers


def main(job_name: str) -> None:
    import importlib

    module, _, function = job_name.partition(":")
    job = getattr(importlib.import_module(module), function)
    for line in sys.stdin:
        answers = _run_ranks(json.loads(line), job)
        print("ANSWER " + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
