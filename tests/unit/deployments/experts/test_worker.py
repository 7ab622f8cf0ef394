"""What makes Serve replace an expert worker."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from cluster.errors import CheckpointError
from deployments.directory.members import Heartbeat, HeartbeatReply, Orders
from deployments.experts.worker import ExpertWorker
from routing.tokens.membership import WorkerMember
from routing.tokens.placement import NO_TABLE
from routing.tokens.share import Share, without


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

    async def _heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        return HeartbeatReply(True, NO_TABLE)

    async def _leave(self, worker_id: str) -> None:
        self.left.append(worker_id)


def test_a_worker_that_fenced_itself_leaves_the_table_at_once() -> None:
    fenced, directory = worker(None), _Directory()
    fenced._directory = directory  # type: ignore[assignment]
    fenced._heartbeat_interval_s, fenced._seen = 0.001, NO_TABLE
    fenced._cores, fenced._left, fenced._orders, fenced._wish = None, False, None, None
    fenced._member = WorkerMember("w", 0, 1, "node", "h:1", "ready")
    answers = iter([None, None, "3 turns failed"])
    fenced._host = SimpleNamespace(failure=lambda: next(answers), busy_s=lambda: 0.0, work=lambda: 0.0)  # type: ignore[assignment]
    asyncio.run(asyncio.wait_for(fenced._beat(), 10))
    assert directory.left == ["w"]
    with pytest.raises(RuntimeError, match="3 turns failed"):
        asyncio.run(fenced.check_health())


# --- what the directory wants ---


class Host:
    """Holds what it is told, in memory that is never short."""

    def __init__(self, held: Share) -> None:
        self.held = held
        self.steps: list[tuple[str, Share]] = []
        self.broken = False

    def nbytes_of(self, share: Share) -> int:
        return sum(map(len, share.values())) << 20

    def load(self, share: Share, holders: object) -> None:
        if self.broken:
            raise CheckpointError("shard is gone")
        self.steps.append(("load", share))
        self.held = {layer: (*self.held.get(layer, ()), *ids) for layer, ids in share.items()}

    def drop(self, share: Share) -> None:
        self.steps.append(("drop", share))
        self.held = without(self.held, share)


def orders(keeps: Share, share: Share | None = None) -> Orders:
    return Orders(1, keeps, {} if share is None else share)


def obeying(host: Host, told: list[Share]) -> ExpertWorker:
    """A worker with this host; what it says that it holds goes into `told`."""
    made = object.__new__(_Worker)
    made._host = host  # type: ignore[assignment]
    made._member = WorkerMember("w", 0, 1, "n", "n:1", "ready", held=host.held, elastic=True)

    async def register() -> None:
        told.append(made._member.held)
        made._said = made._member

    made._said = made._member
    made._from_peers = False
    made._register = register  # type: ignore[method-assign]
    return made


def test_a_worker_drops_first_and_says_after_each_step_what_it_holds() -> None:
    host, told = Host({1: (0, 1)}), list[Share]()
    one = obeying(host, told)
    share: Share = {1: (2, 3)}

    async def scenario() -> None:
        while await one._step_to(orders({1: (1, 2, 3)}, share)):
            pass
        assert one._member.share == share
        assert await one._step_to(orders({1: (1, 2, 3)}, {1: (3,)}))  # its slot's share alone: nothing to load or drop
        assert one._member.share == {1: (3,)}

    asyncio.run(scenario())
    assert host.steps == [("drop", {1: (0,)}), ("load", {1: (2, 3)})]
    assert told == [{1: (1,)}, {1: (1, 2, 3)}, {1: (1, 2, 3)}]
    assert one._member.elastic


@pytest.mark.parametrize("trouble", ["no room", "broken shard"])
def test_a_worker_that_cannot_load_more_says_so_and_serves_on(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    host, told = Host({1: (0,)}), list[Share]()
    host.broken = trouble == "broken shard"
    if trouble == "no room":
        monkeypatch.setattr("deployments.experts.worker.free_memory_bytes", lambda: 100 << 20)
    one = obeying(host, told)
    asyncio.run(one._step_to(orders({1: (0, 1)})))
    assert (one._member.elastic, one._member.held) == (False, {1: (0,)})
    assert told == [{1: (0,)}]
    assert not asyncio.run(one._step_to(orders({1: (0, 1)})))  # not again
    assert asyncio.run(one._step_to(orders({})))  # but it still drops
    assert one._member.held == {}
