"""The leak check sees what it must, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.leftovers import Leftovers


def test_a_child_process_is_named_until_it_is_gone() -> None:
    before = Leftovers()
    child = subprocess.Popen(["sleep", "1000"])
    try:
        assert f"process {child.pid} sleep 1000" in before.left(wait_s=0.2)
        assert str(child.pid) not in "".join(Leftovers().left(wait_s=0))  # it was there before
    finally:
        child.kill()
        child.wait()
    assert str(child.pid) not in "".join(before.left(wait_s=5))


def test_a_temporary_directory_counts_unless_somebody_works_in_it() -> None:
    before = Leftovers()
    folder = Path(tempfile.mkdtemp(prefix="dsplit-leftover-"))
    user = subprocess.Popen(["tail", "-f", "/dev/null", str(folder / "log")], stderr=subprocess.DEVNULL)
    try:
        assert f"directory {folder}" not in before.left(wait_s=0)
        user.kill()
        user.wait()
        assert f"directory {folder}" in before.left(wait_s=0)
    finally:
        user.kill()
        shutil.rmtree(folder)
    assert f"directory {folder}" not in before.left(wait_s=0)
