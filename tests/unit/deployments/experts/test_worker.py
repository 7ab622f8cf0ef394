"""What makes Serve replace an expert worker."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from deployments.experts.worker import ExpertWorker


class _Worker(ExpertWorker):
    def __del__(self) -> None:  # type: ignore[override]  # Serve awaits the real one; here the collector calls it
        pass


def worker(computing_s: float, loading: bool = False, failure: str | None = None) -> ExpertWorker:
    """A worker that never went through its constructor, which needs Ray: `check_health` reads these four."""
    made = object.__new__(_Worker)
    made._failure = None
    made._call_timeout_s = 30.0
    made._beating = SimpleNamespace(done=lambda: False)  # type: ignore[assignment]
    if not loading:
        made._host = SimpleNamespace(  # type: ignore[assignment]
            computing_s=lambda: computing_s, failure=lambda: failure
        )
    return made


@pytest.mark.parametrize("one", [worker(0.0), worker(29.0), worker(0.0, loading=True)])
def test_a_worker_that_computes_or_loads_is_well(one: ExpertWorker) -> None:
    asyncio.run(one.check_health())


def test_a_worker_whose_gpu_is_lost_is_replaced() -> None:
    with pytest.raises(RuntimeError, match="the GPU refuses every call"):
        asyncio.run(worker(0.0, failure="the GPU refuses every call since a kernel failed").check_health())


def test_a_worker_whose_kernel_hangs_is_replaced() -> None:
    hung = worker(31.0)
    with pytest.raises(RuntimeError, match=r"more than dispatch\.call_timeout_s \(30 s\): .* the kernel seems to hang"):
        asyncio.run(hung.check_health())
    hung._host.computing_s = lambda: 0.0  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):  # Serve asks several times before it acts
        asyncio.run(hung.check_health())
