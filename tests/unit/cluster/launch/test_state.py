import dataclasses
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from cluster.errors import StartupError
from cluster.launch.state import ClusterState, StateFolder

STATE = ClusterState(
    supervisor=psutil.Process().pid,
    supervisor_started=psutil.Process().create_time(),
    root="/tmp/x",
    session=1,
    address="127.0.0.1:1",
    joined=False,
    ready=True,
    config='{"model": {"path": "/m"}}',
)


def test_round_trip_private_and_cleared(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "run")
    assert folder.read() is None
    folder.write(STATE)
    assert folder.read() == STATE
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "run" / "cluster.json").stat().st_mode) == 0o600
    folder.clear()
    assert list(tmp_path.iterdir()) == []


def test_supervisor_is_known_by_pid_and_start_time() -> None:
    assert STATE.supervisor_process() is not None
    assert dataclasses.replace(STATE, supervisor_started=1.0).supervisor_process() is None
    assert dataclasses.replace(STATE, supervisor=0).supervisor_process() is None


def test_lock_is_exclusive_and_dies_with_its_holder(tmp_path: Path) -> None:
    script = (
        "import sys,time; from pathlib import Path; from cluster.launch.state import StateFolder\n"
        f"f = StateFolder(Path({str(tmp_path)!r})); print(f.lock(), flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4]
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    folder = StateFolder(tmp_path)
    assert not folder.lock()
    holder.kill()
    holder.wait()
    assert folder.lock()
    folder.clear()
    assert StateFolder(tmp_path).lock()


def test_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text("{")
    with pytest.raises(StartupError, match="is damaged"):
        StateFolder(tmp_path).read()
