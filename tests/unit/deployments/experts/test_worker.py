"""What makes Serve replace an expert worker."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from deployments.directory.members import HeartbeatReply
from deployments.experts.worker import ExpertWorker
from routing.tokens.membership import WorkerMember


class _Worker(ExpertWorker):
    def __del__(self) -> None:  # type: ignore[override]  # Serve awaits the real one; here the collector calls it
        pass


def worker(failure: str | None, loading: bool = False) -> ExpertWorker:
    """A worker that never went through its constructor, which needs Ray: `check_health` reads these three."""
    made = object.__new__(_Worker)
    made._failure = None
    made._beating = SimpleNamespace(done=lambda: False)  # type: ignore[assignment]
    if not loading:
        made._host = SimpleNamespace(failure=lambda: failure)  # type: ignore[assignment]
    return made


@pytest.mark.parametrize("one", [worker(None), worker(None, loading=True)])
def test_a_worker_that_computes_or_loads_is_well(one: ExpertWorker) -> None:
    asyncio.run(one.check_health())


def test_a_worker_that_fenced_itself_is_replaced() -> None:
    fenced = worker("3 turns of the experts in a row failed")
    with pytest.raises(RuntimeError, match="3 turns of the experts in a row failed"):
        asyncio.run(fenced.check_health())
    fenced._host.failure = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):  # Serve asks several times before it acts
        asyncio.run(fenced.check_health())


class _Directory:
    """Answers heartbeats, and keeps who left."""

    def __init__(self) -> None:
        self.left: list[str] = []
        self.heartbeat = SimpleNamespace(remote=self._heartbeat)
        self.leave = SimpleNamespace(remote=self._leave)

    async def _heartbeat(self, worker_id: str, busy: float) -> HeartbeatReply:
        return HeartbeatReply(True, 1, 0.0)

    async def _leave(self, worker_id: str) -> None:
        self.left.append(worker_id)


def test_a_worker_that_fenced_itself_leaves_the_table_at_once() -> None:
    fenced, directory = worker(None), _Directory()
    fenced._directory = directory  # type: ignore[assignment]
    fenced._heartbeat_interval_s, fenced._seen_epoch = 0.001, 0
    fenced._cores, fenced._left = None, False
    fenced._member = WorkerMember("w", 0, 1, "node", "h:1", "ready")
    answers = iter([None, None, "3 turns failed"])
    fenced._host = SimpleNamespace(failure=lambda: next(answers), busy_s=lambda: 0.0)  # type: ignore[assignment]
    asyncio.run(asyncio.wait_for(fenced._beat(), 10))
    assert directory.left == ["w"]
    with pytest.raises(RuntimeError, match="3 turns failed"):
        asyncio.run(fenced.check_health())
