"""The directory: one small Serve replica that knows who is there. It publishes the placement table to attention
replicas and the attention replicas to gateways.

Off the hot path. When it dies, serving goes on with the last table, and its successor learns everything from the
workers, who announce themselves again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import ray
from ray import serve

from cluster.config import Config
from cluster.model.spec import load_model_spec
from cluster.plan.pools import with_copies
from cluster.plan.shares import split_shares
from deployments.directory.members import AdmissionEndpoint, FleetView, GatewayMember, ReplicaEndpoint
from deployments.directory.ray_agents import RayAgents
from deployments.hosting.scrape import scrape_process
from deployments.hosting.serve_logs import start_logging
from monitoring.discovery import ScrapeTarget
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import DirectoryMetrics
from routing.tokens.membership import Member, Membership

NAME = "Directory"
LONG_POLL_S = 2.0
_POLLS_UNTIL_LOST = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttentionMember:
    """One attention replica, as it introduces itself with every long poll."""

    replica_id: str
    pid: int
    node: str
    state: str  # starting, ready (it takes requests at `url`) or draining
    url: str = ""
    token: str = field(default="", repr=False)
    scrape: tuple[ScrapeTarget, ...] = ()  # its own, and its engine's once that listens


@dataclass(frozen=True)
class Assignment:
    """What a new expert worker is to hold: experts per layer."""

    slot: int
    experts: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Standing:
    """Answer to a heartbeat: whether the directory knows the worker, the newest published epoch (0: none), and how busy
    the expert plane is.
    """

    known: bool
    epoch: int
    plane_busy: float  # mean over all workers that are ready, 0 to 1


class Directory:
    """Serve replica. All decisions are `Membership`'s."""

    def __init__(self, config_json: str) -> None:
        config = Config.model_validate_json(config_json)
        start_logging(config.logging, "directory")
        spec = load_model_spec(config.model.path)
        experts = config.experts
        held = split_shares(spec.num_experts, experts.worker_shares(), experts.replicas_per_expert)
        self._slots = [dict.fromkeys(spec.moe_layers, ids) for ids in with_copies(held, experts)]
        self._workers = experts.workers  # slots from here on are spare
        self._busy: dict[str, float] = {}  # by worker id, as of its last heartbeat
        self._model = config.model.name or config.model.path.name
        self._membership = Membership(self._slots, experts.heartbeat_timeout_s, time.monotonic())
        self._attention: dict[str, tuple[AttentionMember, float]] = {}
        self._changed = asyncio.Event()
        self._gateways: dict[str, tuple[GatewayMember, float]] = {}
        self._admission: AdmissionEndpoint | None = None
        self._admission_demand = (0.0, -math.inf)  # in attention replicas, and when it was heard
        self._draining = False
        self._going: set[str] = set()  # nodes that are about to go
        self._leaving: set[str] = set()  # those of them that take nothing new any more
        self._admission_scrape: ScrapeTarget | None = None
        self._view = FleetView(time.time_ns(), (), None, False)  # never a version of an earlier directory
        self._viewed = asyncio.Event()
        node = ray.util.get_node_ip_address()
        registry = ProcessRegistry()
        self._metrics = DirectoryMetrics(registry)
        self._metrics.members_wanted.labels("experts").set(experts.workers)
        self._metrics.members_wanted.labels("attention").set(config.attention.replicas)
        self._metrics.members_wanted.labels("gateway").set(config.gateway.replicas)
        for event in ("joined", "ready", "left", "lost"):  # from 0 on, or rates miss the first
            self._metrics.worker_events.labels(event)
        self._scrape = scrape_process(registry, "directory", "", node, config)
        self._agents = RayAgents()

    # --- expert workers ---

    async def join(self, worker_id: str, pid: int, node: str, slots: range) -> Assignment | None:
        """The share of a new expert worker, whose pool has `slots`; None: all are taken, ask again."""
        slot = self._membership.join(worker_id, pid, node, time.monotonic(), slots)
        if slot is None:
            return None
        self._metrics.worker_events.labels("joined").inc()
        self._look()
        return Assignment(slot, self._slots[slot])

    async def announce(self, member: Member, seen_epoch: int) -> bool:
        """See `Membership.announce`."""
        accepted = self._membership.announce(member, seen_epoch, time.monotonic())
        if accepted and member.state == "ready":
            self._metrics.worker_events.labels("ready").inc()
        self._wake()
        return accepted

    async def heartbeat(self, worker_id: str, busy: float) -> Standing:
        """A worker's sign of life, with the share of its time that it computes."""
        known = self._membership.heartbeat(worker_id, time.monotonic())
        table = self._membership.table(time.monotonic())
        self._busy[worker_id] = busy
        ready = [member.worker_id for member in self._membership.members() if member.state == "ready"]
        self._busy = {one: self._busy[one] for one in ready if one in self._busy}
        plane_busy = sum(self._busy.values()) / len(self._busy) if self._busy else 0.0
        return Standing(known, table.epoch if table else 0, plane_busy)

    async def leave(self, worker_id: str) -> None:
        """A worker that ends in good order."""
        self._membership.leave(worker_id)
        self._metrics.worker_events.labels("left").inc()
        self._wake()

    # --- attention replicas and operators ---

    async def introduce(self, member: AttentionMember) -> None:
        """What an attention replica says of itself, with each poll and whenever it changes."""
        self._attention[member.replica_id] = (member, time.monotonic())
        self._look()

    async def table(self, after_epoch: int, member: AttentionMember | None = None) -> str | None:
        """The placement table as JSON once its epoch is above `after_epoch`; None after LONG_POLL_S (ask again)."""
        self._membership.saw(after_epoch)
        if member is not None:
            await self.introduce(member)
        deadline = time.monotonic() + LONG_POLL_S
        while True:
            now = time.monotonic()
            self._expire(now)
            table = self._membership.table(now)
            if table is not None and table.epoch > after_epoch:
                return table.to_json()
            if now >= deadline:
                return None
            # The event covers what is announced, the short wait what falls silent.
            try:
                await asyncio.wait_for(self._changed.wait(), min(0.25, deadline - now))
            except TimeoutError:
                continue

    async def status(self) -> str:
        """State of both planes as JSON; `deepsplit status` prints it."""
        now = time.monotonic()
        self._expire(now)
        table = self._membership.table(now)
        alive = self._live_attention(now)
        return json.dumps(
            {
                "model": self._model,
                "placement_epoch": table.epoch if table else 0,
                "attention": [{"id": m.replica_id, "pid": m.pid, "node": m.node, "state": m.state} for m in alive],
                "experts": [
                    {
                        "id": m.worker_id, "pid": m.pid, "node": m.node, "address": m.address, "state": m.state,
                        "experts": {str(layer): ids for layer, ids in self._slots[m.slot].items()},
                    }
                    for m in self._membership.members()
                ],
            }
        )  # fmt: skip

    # --- gateways ---

    async def gateway(self, member: GatewayMember, after_version: int) -> FleetView | None:
        """The fleet once its version is not `after_version`; None after LONG_POLL_S (ask again). While draining: at
        once, so that `drain` and `leave_node` see each gateway's progress.
        """
        self._gateways[member.gateway_id] = (member, time.monotonic())
        if not self._draining and member.node not in self._leaving:
            view = await self._next_view(after_version)
            return view if view is None or member.node not in self._leaving else replace(view, draining=True)
        return replace(self._view, draining=True)

    async def admission(
        self, endpoint: AdmissionEndpoint, scrape: ScrapeTarget, after_version: int, demand: float
    ) -> FleetView | None:
        """As `gateway`, for the common admission, which says where it listens and what is asked of it."""
        self._admission, self._admission_scrape = endpoint, scrape
        self._admission_demand = demand, time.monotonic()
        self._look()
        return await self._next_view(after_version)

    async def demand(self) -> float | None:
        """Attention replicas that all gateways' requests would fill; None while no gateway is known."""
        now = time.monotonic()
        gateways = self._live_gateways(now)
        return total_demand(gateways, *self._admission_demand, now) if gateways else None

    async def drain(self) -> int:
        """Have every gateway refuse new requests; returns how many they still hold. Ask again until it is 0."""
        self._draining = True
        self._look()
        return _still_open(self._live_gateways(time.monotonic()))

    async def leave_node(self, node: str, settled: bool) -> int:
        """`node` is about to go. Once `settled`: its gateways refuse new requests, its attention replicas get none.
        Returns how many requests still need the node; ask again until it is 0. A node with neither is needed as long as
        a gateway that is going too has requests: then the whole cluster may be going.
        """
        self._going.add(node)
        if settled:
            self._leaving.add(node)
        self._look()
        gateways = self._live_gateways(time.monotonic())
        here = [m for m in gateways if m.node == node]
        if here:
            return _still_open(here)
        replicas = {m.replica_id for m in self._live_attention(time.monotonic()) if m.node == node}
        if replicas:
            return sum(m.in_flight.get(replica_id, 0) for m in gateways for replica_id in replicas)
        return _still_open([m for m in gateways if m.node in self._going])

    async def _next_view(self, after_version: int) -> FleetView | None:
        deadline = time.monotonic() + LONG_POLL_S
        while self._look() == after_version:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._viewed.wait(), left_s)
        return self._view

    def _look(self) -> int:
        """Bring the view and the metrics up to date; returns the view's version."""
        now = time.monotonic()
        self._expire(now)
        attention, gateways = self._live_attention(now), self._live_gateways(now)
        endpoints = tuple(
            ReplicaEndpoint(m.replica_id, m.url, m.token, m.pid, m.node, m.node in self._leaving)
            for m in attention
            if m.state == "ready"
        )
        targets = [
            self._scrape.target,
            *(m.scrape for m in gateways),
            *(target for m in attention for target in m.scrape),
            *(m.scrape for m in self._membership.members() if m.scrape is not None),
            *self._agents.targets(now),
        ]
        if self._admission_scrape is not None:
            targets.append(self._admission_scrape)
        view = FleetView(self._view.version, endpoints, self._admission, self._draining, tuple(targets))
        if view != self._view:
            self._view = replace(view, version=view.version + 1)
            self._viewed.set()
            self._viewed = asyncio.Event()
            self._count()
        return self._view.version

    def _count(self) -> None:
        now, metrics = time.monotonic(), self._metrics
        attention, gateways = self._live_attention(now), self._live_gateways(now)
        table = self._membership.table(now)
        metrics.epoch.set(table.epoch if table else 0)
        metrics.uncovered.set(self._membership.uncovered())
        for state in ("loading", "ready"):
            slots = [m.slot for m in self._membership.members() if m.state == state]
            metrics.members.labels("experts", state).set(sum(slot < self._workers for slot in slots))
            metrics.members.labels("spare_experts", state).set(sum(slot >= self._workers for slot in slots))
        for state in ("starting", "ready", "draining"):
            metrics.members.labels("attention", state).set(sum(m.state == state for m in attention))
        for state, draining in (("ready", False), ("draining", True)):
            metrics.members.labels("gateway", state).set(sum(m.draining == draining for m in gateways))

    def _expire(self, now_s: float) -> None:
        for lost in self._membership.expire(now_s):
            self._metrics.worker_events.labels("lost").inc()
            fields = {"worker_id": lost.worker_id, "worker_pid": lost.pid, "worker_node": lost.node}
            logger.warning("an expert worker fell silent", extra={"fields": fields})
            self._count()

    def _live_attention(self, now_s: float) -> list[AttentionMember]:
        alive = [m for m, heard in self._attention.values() if now_s - heard < _POLLS_UNTIL_LOST * LONG_POLL_S]
        self._attention = {m.replica_id: self._attention[m.replica_id] for m in alive}
        return alive

    def _live_gateways(self, now_s: float) -> list[GatewayMember]:
        alive = [m for m, heard in self._gateways.values() if now_s - heard < _POLLS_UNTIL_LOST * LONG_POLL_S]
        self._gateways = {m.gateway_id: self._gateways[m.gateway_id] for m in alive}
        return alive

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        self._look()
        self._count()


def total_demand(gateways: Sequence[GatewayMember], common: float, heard_s: float, now_s: float) -> float:
    """Of gateways that decide alone and, if it was heard of lately (`heard_s`), of the `common` admission."""
    alone = sum(m.demand for m in gateways)
    return alone + (common if now_s - heard_s < _POLLS_UNTIL_LOST * LONG_POLL_S else 0.0)


def _still_open(gateways: Sequence[GatewayMember]) -> int:
    """Requests of gateways that are to drain; one that does not know of it yet may still take some."""
    return sum(m.open_requests if m.draining else max(1, m.open_requests) for m in gateways)


def directory_deployment(config: Config) -> serve.Application:
    """The directory, bound."""
    deployment = serve.deployment(
        Directory,
        name=NAME,
        num_replicas=1,
        max_ongoing_requests=10_000,  # long polls and heartbeats of the whole cluster
        ray_actor_options={"num_cpus": 0},
        logging_config=config.logging.of_serve,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return deployment.bind(config.model_dump_json())
