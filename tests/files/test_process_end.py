"""How a process ends: with its exit code and its output whole, its interpreter left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from kills import child_environment

PROGRAM = """
import atexit, sys
from rrhf.process_end import run_process

class Witness:
    def __del__(self):
        sys.stderr.write("the interpreter was taken down\\n")

witness = Witness()
atexit.register(lambda: print("atexit ran"))

def work():
    print("a line that is not flushed")
    {work}

run_process(work)
"""


def buffered(**changes: str) -> dict[str, str]:
    environment = child_environment() | changes
    environment.pop("PYTHONUNBUFFERED", None)
    return environment


def ended(work: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(work=work)],
        env=buffered(**environment),
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("world_size", ["1", "2"])
@pytest.mark.parametrize(
    ("work", "code", "message"),
    [
        ("return 0", 0, ""),
        ("pass", 0, ""),
        ("return 75", 75, ""),
        ("sys.exit(2)", 2, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('a sentence')", 1, "a sentence\n"),
        ("raise KeyError('x')", 1, "KeyError: 'x'\n"),
    ],
)
def test_the_exit_code_and_all_output_come_through(
    work: str, code: int, message: str, world_size: str
) -> None:
    done = ended(work, WORLD_SIZE=world_size)
    assert done.returncode == code
    assert done.stdout == "a line that is not flushed\natexit ran\n"
    witness = "the interpreter was taken down\n"
    assert done.stderr.endswith(message + witness if world_size == "1" else message)
    assert (witness in done.stderr) == (world_size == "1")


@pytest.mark.parametrize(("world_size", "is_taken_down"), [("1", True), ("2", False)])
def test_the_command_of_a_rank_ends_so(world_size: str, is_taken_down: bool) -> None:
    program = PROGRAM.partition("atexit.register")[0].replace("import run_process", "import *")
    program += "import runpy\nsys.argv = ['rrhf', '--version']\n"
    program += "runpy.run_module('rrhf.cli.main', run_name='__main__')\n"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=buffered(WORLD_SIZE=world_size),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("rrhf ")
    assert ("taken down" in done.stderr) == is_taken_down


def test_a_reader_that_went_away_does_not_change_the_code_of_a_rank() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work="return 75")],
        env=buffered(WORLD_SIZE="2"),
        stdout=write,
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    assert process.wait() == 75
