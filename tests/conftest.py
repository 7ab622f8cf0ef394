"""Shared fixtures: the demo checkpoint, random checkpoints by shape, the check that a module cleans up after itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

_REPOSITORY = Path(__file__).resolve().parents[1]
_CLEANUP_S = 15
_T = TypeVar("_T")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo checkpoint that is part of the repository."""
    path = _REPOSITORY / "models" / "demo"
    assert (path / "config.json").exists(), f"{path} has no config.json: restore the folder, or train it again"
    return path


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`random_checkpoint("sixty_experts", dtype="bfloat16", shards=3)`: one of `SHAPES`, made once per session."""
    from tests.checkpoints import SHAPES, make_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")

    def make(shape: str, *, dtype: str = "float32", seed: int = 0, shards: int = 1) -> Path:
        folder = root / f"{shape}-{dtype}-{seed}-{shards}"
        if not folder.exists():
            make_checkpoint(folder, SHAPES[shape], dtype=dtype, seed=seed, shards=shards)  # type: ignore[arg-type]
        return folder

    return make


@pytest.fixture(scope="module")
def no_leftovers() -> Iterator[None]:
    """Fails if the module leaves a child process, or a directory of ours or of Ray's in /tmp or /dev/shm.

    For modules that start processes: `pytestmark = pytest.mark.usefixtures("no_leftovers")`. Directories of processes
    that run beside the tests (another Ray, say) are not ours: only what the module's own processes made counts, told by
    the process id in the name or by who has files open in it.
    """
    children, folders = _children(), _temporary_folders()
    yield
    left_children = _settle(lambda: _children() - children)
    assert not left_children, f"left running: {[_describe(child) for child in left_children]}"
    left_folders = _settle(lambda: {folder for folder in _temporary_folders() - folders if not _in_use(folder)})
    assert not left_folders, f"left behind: {sorted(map(str, left_folders))}"


def _settle(left: Callable[[], set[_T]]) -> set[_T]:
    """What is `left` when nothing is, or after the time that a clean end may take."""
    deadline = time.monotonic() + _CLEANUP_S
    while (now := left()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return now


def _children() -> set[psutil.Process]:
    return {child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}


def _temporary_folders() -> set[Path]:
    patterns = ("/tmp/ray*", "/tmp/ray/session_*", "/tmp/deepsplit*", "/tmp/dsplit*", "/dev/shm/deepsplit*")
    return {path for pattern in patterns for path in Path("/").glob(pattern.lstrip("/"))}


def _in_use(folder: Path) -> bool:
    """Whether a living process works with `folder`: then it is not what a finished test left."""
    text = str(folder)
    for process in psutil.process_iter(["cmdline"]):
        if any(text in argument for argument in process.info["cmdline"] or ()):
            return True
    return False


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.NoSuchProcess:
        return str(process.pid)
