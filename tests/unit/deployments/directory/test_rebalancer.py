"""Rounds of moves: when there are some, and what is said of them. Real membership, short intervals."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from cluster.config import ExpertsConfig
from deployments.directory.rebalancer import Rebalancer
from monitoring.metrics import DirectoryMetrics
from routing.tokens.membership import Membership, WorkerMember
from routing.tokens.placement import NO_TABLE
from routing.tokens.routed_tokens import RoutedTokens

LAYERS, EXPERTS = (1, 2), 16
HALVES = tuple(dict.fromkeys(LAYERS, tuple(range(at, at + EXPERTS // 2))) for at in (0, EXPERTS // 2))
GIB = 1 << 30


class World:
    """A pair of workers, one of them fast, with an even load."""

    def __init__(self, **rates: float) -> None:
        self.registry = CollectorRegistry()
        self.membership = Membership(HALVES, 60.0, time.monotonic(), incarnation=7)
        settings = {"interval_s": 0.02, "headroom": 0.5}
        experts = ExpertsConfig.model_validate({"rebalance": settings})
        self.rebalancer = Rebalancer(experts, LAYERS, EXPERTS, self.membership, DirectoryMetrics(self.registry))
        self.total = 0
        self.members = {}
        for slot, (name, rate) in enumerate(rates.items()):
            assert self.membership.join(name, 1, name, time.monotonic()) == slot
            self.obey(WorkerMember(name, slot, 1, name, "h:1", "ready", held=HALVES[slot], elastic=True,
                                   expert_bytes=1 << 20, speed=rate, free_bytes=8 * GIB))  # fmt: skip

    def obey(self, member: WorkerMember) -> None:
        self.members[member.worker_id] = member
        assert self.membership.register(member, NO_TABLE, time.monotonic())
        self.membership.heartbeat(member.worker_id, 0.5, time.monotonic(), member.speed, member.free_bytes)

    def serve(self, tokens: int = 100_000) -> None:
        self.total += tokens
        counts_LE = np.full((len(LAYERS), EXPERTS), self.total, dtype=np.int64)
        self.rebalancer.report("attention", RoutedTokens(LAYERS, counts_LE), time.monotonic())

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"deepsplit_experts_{name}")


def test_moves_that_pay_are_made_and_measured() -> None:
    world = World(fast=3000.0, slow=1000.0)

    async def scenario() -> None:
        world.serve(1)
        world.serve()
        assert await world.rebalancer.run()
        assert not await world.rebalancer.run()  # they are under way
        while not world.membership.settled():
            for name, member in list(world.members.items()):
                world.obey(replace(member, held=world.membership.keeps(name)))
            table = world.membership.table()
            assert table is not None
            world.membership.followed([table.stamp])
        world.serve()
        await asyncio.sleep(0.05)
        assert not await world.rebalancer.run()

    asyncio.run(scenario())
    last = world.rebalancer.last
    assert last is not None
    assert last.predicted_gain > 0.3
    assert last.measured_gain == pytest.approx(last.predicted_gain, abs=0.1)
    assert world.value("rebalances_total") == 1
    assert world.value("moved_total") == last.experts > 0
    assert world.value("moved_bytes_total") == last.experts << 20
    assert world.value("balancedness_ratio") == pytest.approx(1.0, abs=0.1)
    assert world.value("rebalance_measured_gain_ratio") == last.measured_gain


def test_nothing_moves_without_load_or_a_gain() -> None:
    async def rounds(world: World) -> bool:
        world.serve(1)
        if await world.rebalancer.run():
            return True
        world.serve()
        return await world.rebalancer.run()

    assert asyncio.run(rounds(World(one=1000.0, other=1000.0))) is False
    idle = World(fast=3000.0, slow=1000.0)
    assert asyncio.run(idle.rebalancer.run()) is False
    assert idle.value("balancedness_ratio") == 0


def test_nothing_moves_while_a_worker_is_missing() -> None:
    world = World(fast=3000.0, slow=1000.0)

    async def scenario() -> bool:
        world.serve(1)
        world.serve()
        world.membership.leave("slow")
        return await world.rebalancer.run()

    assert not asyncio.run(scenario())
