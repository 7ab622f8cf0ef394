import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.launch.processes import MARK, end_all, members

# A child that opens a session of its own and ignores SIGTERM, and a grandchild orphaned at once.
TREE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    os._exit(0)
print(os.getpid(), flush=True)
time.sleep(60)
"""


def start(root: Path, marked: bool) -> tuple[subprocess.Popen[str], list[int]]:
    env = {k: v for k, v in os.environ.items() if k != MARK} | ({MARK: str(root)} if marked else {})
    process = subprocess.Popen([sys.executable, "-c", TREE], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    return process, [int(process.stdout.readline()) for _ in range(2)]


def gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def test_orphans_in_other_sessions_are_found_by_their_mark(tmp_path: Path) -> None:
    process, pids = start(tmp_path, marked=True)
    assert {member.pid for member in members(tmp_path, session=None, descendants=False)} >= set(pids)
    assert set(pids) <= set(end_all(tmp_path, session=None, grace_s=0))
    assert gone(pids)
    process.wait()


def test_other_clusters_are_left_alone(tmp_path: Path) -> None:
    # A cluster of another root, in a process tree that is not ours: an orphan of init or of the nearest reaper.
    script = (
        "import subprocess as s, sys\n"
        "print(s.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=s.DEVNULL).pid)"
    )
    env = os.environ | {MARK: "/elsewhere"}
    other = subprocess.run([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, check=True)
    pid = int(other.stdout)
    try:
        assert pid not in {member.pid for member in members(tmp_path, session=None, descendants=False)}
    finally:
        os.kill(pid, 9)


def test_grace_lets_processes_end_by_themselves(tmp_path: Path) -> None:
    env = os.environ | {MARK: str(tmp_path)}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"], env=env)
    began = time.monotonic()
    assert end_all(tmp_path, session=None, grace_s=20) == []
    assert time.monotonic() - began < 15
    assert gone([child.pid])


@pytest.mark.skipif(sys.platform != "linux", reason="subreapers are Linux's")
def test_subreaper_adopts_orphans(tmp_path: Path) -> None:
    script = f"""
import os, subprocess, sys
from pathlib import Path
from cluster.launch.processes import adopt_orphans, end_all
adopt_orphans()
tree = subprocess.Popen([sys.executable, "-c", {TREE!r}], stdout=subprocess.PIPE, text=True)
pids = [int(tree.stdout.readline()) for _ in range(2)]
killed = end_all(Path({str(tmp_path)!r}), None, 0, descendants=True)
assert set(pids) <= set(killed), (pids, killed)
print("ended")
"""
    root = str(Path(__file__).parents[4])
    env = os.environ | {"PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "ended\n", done.stderr
