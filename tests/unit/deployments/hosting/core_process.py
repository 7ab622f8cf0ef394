"""A process that claims cores and answers questions, for tests: `python -m ... FOLDER THREADS PIN CORES [PROCESSES]`.

CORES: the host's, the first one stays free. PROCESSES: threads of all compute processes, if they are known. Each line
on stdin is one of `look`, `review`, `close` or `child`; each is answered with one line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from cluster.plan.cores import ComputeProcess, Core, HostCores, assign
from deployments.hosting.process_cores import ProcessCores, child_pids

AFFINITY = "import os; print(sorted(os.sched_getaffinity(0)))"


def main() -> None:
    folder, threads, pin, numbers, *known = sys.argv[1:]
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    host = HostCores(tuple(Core(int(number), int(number), 0) for number in numbers.split(",")))
    process = ComputeProcess("p-0", int(threads), pin)  # type: ignore[arg-type]
    together = [ComputeProcess(f"p-{i}", int(n)) for i, n in enumerate(known[0].split(","))] if known else []
    early, loaded = threading.Event(), threading.Event()
    threading.Thread(target=early.wait, daemon=True).start()  # there before the cores are
    child = None
    cores = ProcessCores(process, host, Path(folder), assign(host, together) if known else None)
    cores.start()
    threading.Thread(target=loaded.wait, daemon=True).start()  # as the loader's threads are
    command = "look"
    while command:
        if command == "review":
            cores.review()
        elif command == "close":
            cores.close()
        elif command == "child":
            child = subprocess.Popen([sys.executable, "-c", AFFINITY], stdout=subprocess.PIPE, text=True)
            assert child.pid in child_pids()
        answer = {
            "text": str(cores.share),
            "pinned": cores.share.pinned,
            "cores": list(cores.share.cores),
            "threads": sorted(
                {tuple(sorted(os.sched_getaffinity(int(thread.name)))) for thread in Path("/proc/self/task").iterdir()}
            ),
            "environment": cores.environment(),
            "child": child.communicate()[0].strip() if child is not None else "",
        }
        child = None
        print(json.dumps(answer), flush=True)
        command = sys.stdin.readline().strip()


if __name__ == "__main__":
    main()
