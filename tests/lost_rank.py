"""Two ranks, of which the second stops or ends while the first waits for it: a program."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rrhf.errors import LostRank
from rrhf.process_end import run_process
from rrhf.training.core.parallel import Parallel


def one_rank() -> int:
    """What becomes of it, the patience in seconds."""
    stopping = os.environ["RANK"] == "1"
    parallel = Parallel(timeout_seconds=float(sys.argv[2]))
    try:
        with parallel.lost_ranks_told():
            assert parallel.any(stopping)
            if stopping and sys.argv[1] == "stops":
                os.kill(os.getpid(), signal.SIGSTOP)
            if stopping:
                return 0
            parallel.barrier()
    except LostRank as error:
        print(error, file=sys.stderr)
        return 1
    raise AssertionError("nobody was missed")


def main() -> None:
    """Forks the second, and is the first; its id goes into the working folder."""
    import socket

    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        child = os.fork()
        rank = "0" if child else "1"
        if child:
            Path("second").write_text(str(child))
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
        run_process(one_rank)


if __name__ == "__main__":
    main()
