"""The directory while nodes leave, and what it tells workers of the load; without Ray."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import Config
from deployments.directory.members import (
    AdmissionEndpoint,
    AttentionMember,
    ClusterView,
    Demand,
    GatewayMember,
    Heartbeat,
    Wish,
)
from deployments.directory.registry import Registry
from deployments.directory.replica import Directory
from monitoring.discovery import ScrapeTarget
from routing.tokens.membership import WorkerMember
from routing.tokens.placement import NO_TABLE


@pytest.fixture
def outside_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.directory.replica.start_logging", lambda *_: None)  # it takes over handlers


@pytest.fixture
def directory(demo_model: Path, outside_serve: None) -> Directory:
    config = {"model": {"path": demo_model}, "monitoring": {"port": 0}}
    return Directory(Config.model_validate(config).model_dump_json())


def beat(worker_id: str, busy: float = 0.0, heard: int = 0) -> Heartbeat:
    return Heartbeat(worker_id, busy, speed=0.0, free_bytes=1 << 40, heard=heard)


async def started(directory: Directory, workers: int, pool: str = "", **said: object) -> None:
    """Workers that hold their slots' shares and may hold others', of a directory that has heard of everybody."""
    directory._started_s -= 60
    for name in [f"{pool}{letter}" for letter in "abcd"[:workers]]:
        assignment = await directory.join(name, 1, "n", pool)
        assert assignment is not None
        member = WorkerMember(name, assignment.slot, 1, "n", "", "ready", held=assignment.experts, elastic=True,
                              expert_bytes=1 << 20, pool=pool)  # fmt: skip
        assert await directory.register_worker(replace(member, **said), NO_TABLE)


def gateway(node: str, open_requests: int, draining: bool = False, **in_flight: int) -> GatewayMember:
    scrape = ScrapeTarget("gateway", f"{node}:9400", node)
    return GatewayMember(f"gateway-{node}", 1, node, open_requests, in_flight, draining, scrape)


async def seen_by(directory: Directory, member: GatewayMember) -> ClusterView:
    view = await directory.register_gateway(member, -1)
    assert view is not None
    return view


def test_only_the_gateways_of_a_leaving_node_drain(directory: Directory) -> None:
    async def scenario() -> None:
        assert not (await seen_by(directory, gateway("a", 2))).draining
        assert not (await seen_by(directory, gateway("b", 4))).draining
        assert await directory.leave_node("a", True) == 2
        assert (await seen_by(directory, gateway("a", 2))).draining
        assert not (await seen_by(directory, gateway("b", 4))).draining
        # Draining ones answer at once, so that their progress is seen; the others wait for news.
        version = (await seen_by(directory, gateway("a", 1, draining=True))).version
        answer = directory.register_gateway(gateway("a", 0, draining=True), version)
        assert await asyncio.wait_for(answer, 0.5) is not None
        assert await directory.leave_node("a", True) == 0

    asyncio.run(scenario())


def test_a_gateway_that_does_not_know_yet_counts(directory: Directory) -> None:
    async def scenario() -> None:
        await seen_by(directory, gateway("a", 0))
        assert await directory.leave_node("a", True) == 1
        await seen_by(directory, gateway("a", 0, draining=True))
        assert await directory.leave_node("a", True) == 0

    asyncio.run(scenario())


def test_attention_replicas_of_a_leaving_node_end_what_they_have(directory: Directory) -> None:
    async def scenario() -> None:
        for name, node in (("x", "a"), ("y", "b")):
            await directory.register_replica(AttentionMember(name, 1, node, "ready", f"http://{name}", "t"))
        await seen_by(directory, gateway("c", 5, x=3, y=2))
        assert await directory.leave_node("a", True) == 3
        view = await seen_by(directory, gateway("c", 3, x=1, y=2))
        assert {endpoint.replica_id: endpoint.leaving for endpoint in view.endpoints} == {"x": True, "y": False}
        assert not view.draining
        assert await directory.leave_node("a", True) == 1

    asyncio.run(scenario())


def test_other_nodes_stay_only_for_gateways_that_are_leaving(directory: Directory) -> None:
    async def scenario() -> None:
        await seen_by(directory, gateway("a", 7))
        assert await directory.leave_node("experts", True) == 0
        assert await directory.leave_node("a", False) == 7
        assert not (await seen_by(directory, gateway("a", 7))).draining  # it may settle first
        assert await directory.leave_node("experts", True) == 7
        assert await directory.leave_node("a", True) == 7
        await seen_by(directory, gateway("a", 6, draining=True))
        assert await directory.leave_node("experts", True) == 6

    asyncio.run(scenario())


def test_expert_workers_of_a_leaving_node_hand_over_first(directory: Directory) -> None:
    directory._started_s -= 60  # it has heard of every attention replica

    async def scenario() -> None:
        members = {}
        for name, node in (("x", "a"), ("y", "b")):
            assignment = await directory.join(name, 1, node, "")
            assert assignment is not None
            held = assignment.experts
            members[name] = WorkerMember(name, assignment.slot, 1, node, "", "ready", held=held, elastic=True)
            assert await directory.register_worker(members[name], NO_TABLE)
        assert await directory.leave_node("a", False) == 1
        orders = (await directory.heartbeat(beat("y"))).orders
        assert orders is not None
        keeps = orders.keeps
        assert (await directory.heartbeat(beat("y", heard=orders.number))).orders is None
        assert {layer: len(ids) for layer, ids in keeps.items()} == {
            layer: 2 * len(ids) for layer, ids in members["y"].held.items()
        }
        assert await directory.register_worker(replace(members["y"], held=keeps), NO_TABLE)
        assert await directory.leave_node("a", True) == 0
        # The last node has nobody to hand over to, and may go.
        assert await directory.leave_node("b", True) == 0

    asyncio.run(scenario())


def test_a_replicas_token_is_not_in_what_could_be_logged() -> None:
    assert "secret" not in repr(AttentionMember("r0", 1, "node", "ready", token="secret"))


def test_what_gateways_ask_for_adds_up(directory: Directory) -> None:
    async def scenario() -> None:
        assert await directory.demand(None) == Demand(None, None)  # one that was just started knows nothing
        await seen_by(directory, replace(gateway("a", 3), demand=0.5))
        await seen_by(directory, replace(gateway("b", 3), demand=1.25))
        assert (await directory.demand(None)).replicas == 1.75
        endpoint = AdmissionEndpoint("127.0.0.1:1", "t")
        await directory.register_admission(endpoint, ScrapeTarget("admission", "a:9401", "a"), -1, 2.0)
        await seen_by(directory, gateway("b", 3))  # it has reached the common admission
        assert (await directory.demand(None)).replicas == 2.5

    asyncio.run(scenario())


def test_a_common_admission_that_fell_silent_asks_for_nothing() -> None:
    registry = Registry(silence_s=10.0, first_version=1)
    registry.register_gateway(replace(gateway("a", 1), demand=0.5), 100.0)
    target = ScrapeTarget("admission", "a:9401", "a")
    registry.register_admission(AdmissionEndpoint("127.0.0.1:1", "t"), target, 2.0, 95.0)
    registry.expire(104.0)
    assert registry.demand() == 2.5
    registry.expire(106.0)
    assert registry.demand() == 0.5


# --- another number of processes ---


def test_a_wish_reaches_workers_replicas_and_status(directory: Directory) -> None:
    async def scenario() -> None:
        await started(directory, 2)
        assert await directory.join("c", 1, "n", "") is None
        assert await directory.scale({"": 3}, None) == ""
        wish = (await directory.heartbeat(beat("a"))).wish
        assert wish is not None
        assert (wish.experts, wish.attention) == ({"": 3}, 1)
        assert (await directory.demand(None)).wish == wish
        assert json.loads(await directory.status())["wanted"] == {"experts": 3, "attention": 1}
        assignment = await directory.join("c", 1, "n", "")
        assert assignment is not None
        assert assignment.slot == 2
        assert await directory.scale({}, 4) == ""
        newer = (await directory.heartbeat(beat("a"))).wish
        assert newer is not None
        assert newer.version > wish.version
        assert (newer.experts, newer.attention) == ({"": 3}, 4)

    asyncio.run(scenario())


def test_a_new_directory_hears_of_the_wish_and_of_the_newest_alone(directory: Directory) -> None:
    async def scenario() -> None:
        await started(directory, 2)
        await directory.heartbeat(replace(beat("a"), wish=Wish(7, {"": 4}, attention=2)))
        await directory.demand(Wish(6, {"": 9}, attention=9))
        assert json.loads(await directory.status())["wanted"] == {"experts": 4, "attention": 2}

    asyncio.run(scenario())


GPUS = {"name": "gpu", "workers": 1, "device": "cuda"}
POOLS = {"experts": {"workers": 3, "pools": [{"name": "a", "workers": 2}, GPUS]}}
BY_LOAD = {"experts": {"autoscaling": {"max_workers": 4, "upscale_delay_s": 0}}, "ray": {"address": "auto"}}


@pytest.mark.parametrize(("config", "said", "asked", "why_not"), [
    ({"attention": {"autoscaling": {"max_replicas": 4}}, "ray": {"address": "auto"}}, {}, ({}, 2), "autoscaling"),
    (BY_LOAD, {}, ({"": 3}, None), "experts.autoscaling is set"),
    (POOLS, {}, ({"": 3}, None), "say which: experts.a=NUMBER or experts.gpu=NUMBER"),
    (POOLS, {}, ({"b": 3}, None), "there is no pool 'b' of expert workers: say experts.a=NUMBER or experts.gpu=NUMBER"),
    (POOLS, {}, ({"gpu": 3}, None), "cannot load others' experts"),
    (POOLS, {"elastic": False}, ({"a": 3}, None), "cannot load others' experts"),
    ({"experts": {"workers": 2, "replicas_per_expert": 2}}, {}, ({"": 1}, None), "replicas_per_expert is 2"),
    ({}, {"elastic": False}, ({"": 3}, None), "cannot load others' experts"),
    ({"experts": {"take_over": False}}, {}, ({"": 3}, None), "cannot load others' experts"),
    ({}, {}, ({"": 100_000}, None), "copies of experts"),
    ({}, {}, ({"": 1}, None), "0 MiB free"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(
    demo_model: Path, outside_serve: None, config: dict[str, object], said: dict[str, object],
    asked: tuple[dict[str, int], int | None], why_not: str,
) -> None:  # fmt: skip
    base = {"model": {"path": demo_model}, "monitoring": {"port": 0}}
    directory = Directory(Config.model_validate(base | config).model_dump_json())

    async def scenario() -> None:
        await started(directory, 2, "a" if config is POOLS else "", **said)
        before = json.loads(await directory.status())["wanted"]
        assert why_not in await directory.scale(*asked)
        assert json.loads(await directory.status())["wanted"] == before

    asyncio.run(scenario())


def test_pools_have_numbers_of_their_own(demo_model: Path, outside_serve: None) -> None:
    base = {"model": {"path": demo_model}, "monitoring": {"port": 0}}
    directory = Directory(Config.model_validate(base | POOLS).model_dump_json())

    async def scenario() -> None:
        await started(directory, 2, "a")
        await started(directory, 1, "gpu", elastic=False)
        gpus = directory._membership.share_of("gpua")
        assert await directory.join("late", 1, "n", "a") is None
        assert await directory.scale({"a": 3}, None) == ""
        wish = (await directory.heartbeat(beat("aa"))).wish
        assert wish is not None
        assert wish.experts == {"a": 3, "gpu": 1}
        assert json.loads(await directory.status())["wanted"]["experts"] == 4
        assert await directory.join("gpus", 1, "n", "gpu") is None
        assert await directory.join("late", 1, "n", "a") is not None
        assert directory._membership.share_of("gpua") == gpus  # its worker could not drop any

    asyncio.run(scenario())


def test_workers_come_and_go_with_the_load(demo_model: Path, outside_serve: None) -> None:
    base = {"model": {"path": demo_model}, "monitoring": {"port": 0}}
    directory = Directory(Config.model_validate(base | BY_LOAD).model_dump_json())

    async def wish() -> dict[str, int]:
        wish = (await asyncio.wait_for(directory.heartbeat(beat("a", 0.9)), 2)).wish
        return {} if wish is None else dict(wish.experts)

    async def scenario() -> None:
        directory._started_s -= 60
        directory._heartbeat_interval_s = 0.02
        for slot, name in enumerate("ab"):  # of an earlier directory: nobody joins this one
            share = directory._membership.share(slot)
            member = WorkerMember(name, slot, 1, "n", "", "ready", held=share, share=share, elastic=True)
            assert await directory.register_worker(member, NO_TABLE)
        assert await wish() == {}
        await directory.heartbeat(beat("b", 0.6))  # 1.5 workers' work, of which each is to do 0.6: 2.5
        for _ in range(50):
            await asyncio.sleep(0.02)
        assert await wish() == {"": 3}

    asyncio.run(scenario())


def test_workers_restart_one_after_the_other(directory: Directory) -> None:
    async def scenario() -> None:
        await started(directory, 2)
        for name in "ab":
            await directory.heartbeat(beat(name))
        assert await directory.restart_experts() == ""
        assert (await directory.heartbeat(beat("a"))).restart
        assert not (await directory.heartbeat(beat("b"))).restart
        assert json.loads(await directory.status())["to_restart"] == ["a", "b"]
        await directory.leave("a")
        assert not (await directory.heartbeat(beat("b"))).restart  # its successor is not there yet
        assignment = await directory.join("c", 1, "n", "")
        assert assignment is not None
        made = WorkerMember("c", assignment.slot, 1, "n", "", "ready", held=assignment.experts, elastic=True)
        assert await directory.register_worker(made, NO_TABLE)
        reply = await directory.heartbeat(beat("b"))
        assert reply.orders is not None
        kept = WorkerMember("b", 1, 1, "n", "", "ready", held=reply.orders.keeps, elastic=True)
        assert await directory.register_worker(kept, NO_TABLE)
        assert (await directory.heartbeat(beat("b"))).restart
        await directory.leave("b")
        assert (await directory.restart_experts()).startswith("expert workers start")

    asyncio.run(scenario())


def test_workers_hear_at_once_that_the_application_ends(directory: Directory) -> None:
    async def scenario() -> None:
        await started(directory, 2)
        orders = (await directory.heartbeat(beat("a"))).orders
        assert orders is not None
        waiting = asyncio.create_task(directory.heartbeat(beat("a", heard=orders.number)))
        await asyncio.sleep(0.05)
        await directory.drain()
        assert (await asyncio.wait_for(waiting, 0.5)).draining

    asyncio.run(scenario())


def test_a_worker_alone_cannot_be_replaced(demo_model: Path, outside_serve: None) -> None:
    config = {"model": {"path": demo_model}, "monitoring": {"port": 0}, "experts": {"workers": 1}}
    alone = Directory(Config.model_validate(config).model_dump_json())

    async def scenario() -> None:
        await started(alone, 1)
        assert "nobody to hand its experts to" in await alone.restart_experts()

    asyncio.run(scenario())


def test_a_directory_that_was_just_started_hears_of_earlier_wishes_first(directory: Directory) -> None:
    async def scenario() -> None:
        await started(directory, 2)
        directory._started_s = time.monotonic() - 5.5  # of 6 s
        asked = asyncio.create_task(directory.scale({}, 2))
        await asyncio.sleep(0.1)
        await directory.heartbeat(replace(beat("a"), wish=Wish(7, {"": 4}, attention=1)))
        assert not asked.done()
        assert await asked == ""
        assert json.loads(await directory.status())["wanted"] == {"experts": 4, "attention": 2}

    asyncio.run(scenario())


def test_nothing_is_dropped_before_every_replica_may_have_polled(directory: Directory) -> None:
    """What they use may be an earlier directory's table."""

    async def scenario() -> None:
        await started(directory, 2)
        directory._started_s += 60
        directory._membership.resize({"": 3})
        assignment = await directory.join("c", 1, "n", "")
        assert assignment is not None
        made = WorkerMember("c", assignment.slot, 1, "n", "", "ready", held=assignment.experts, elastic=True)
        assert await directory.register_worker(made, NO_TABLE)
        for name, later in (("a", False), ("b", False), ("a", True)):
            directory._started_s -= 60 * later
            await directory.status()
            reply = await directory.heartbeat(beat(name))
            assert reply.orders is not None
            may_drop = reply.orders.keeps == reply.orders.share
            assert may_drop is later

    asyncio.run(scenario())
