"""Shared fixtures: the demo checkpoint, random checkpoints by shape, the check that a module cleans up after itself."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.leftovers import Leftovers

# Read by OpenMP when torch is loaded, here and in every process that a test starts: waiting threads that spin take the
# cores of the processes they wait for.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

_REPOSITORY = Path(__file__).resolve().parents[1]


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
    """Fails if the module leaves a child process or a temporary directory behind.

    For modules that start processes: `pytestmark = pytest.mark.usefixtures("no_leftovers")`.
    """
    before = Leftovers()
    yield
    left = before.left(wait_s=15)
    assert not left, "left behind:\n" + "\n".join(left)
