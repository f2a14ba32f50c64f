"""Run a program in several processes of this machine:  python -m utils.launch N PROGRAM [ARGUMENT ...]

As torchrun does, whose variables the processes get, but its exit status is that of the process that failed first, and
it adds no traceback. (For several machines, or restarts, use torchrun.) SIGTERM and Ctrl-C are handed on.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

END_SECONDS = 30  # that the others have to end when a process has failed; who was stopped takes as long as a step


def launch(count: int, command: Sequence[str]) -> int:
    """Run `count` processes of a Python program; end all when one fails. Returns its exit status."""
    with socket.create_server(("localhost", 0)) as free:
        shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    received, told, deadline, failed = [], False, math.inf, 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: received.append(number))
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    processes = [subprocess.Popen([sys.executable, *command], env=os.environ | shared | rank) for rank in ranks]
    statuses = [None]
    while None in statuses:
        time.sleep(0.05)
        statuses = [process.poll() for process in processes]
        failed = failed or next(filter(None, statuses), 0)
        if (received or failed) and not told:
            told = True
            for process in processes:
                process.terminate()
        if failed and not received:
            deadline = min(deadline, time.monotonic() + END_SECONDS)
        for process in processes if time.monotonic() > deadline else ():
            process.kill()
    return 128 - failed if failed < 0 else 128 + received[0] if failed and received else failed


if __name__ == "__main__":
    if len(sys.argv) < 3 or not sys.argv[1].isdecimal():
        sys.stderr.write("usage: python -m utils.launch N PROGRAM [ARGUMENT ...]\n")
        sys.exit(2)
    sys.exit(launch(int(sys.argv[1]), sys.argv[2:]))
