"""The directory: one small Serve replica that knows who is there. It publishes the placement table to attention
replicas and the attention replicas to gateways.

Off the hot path. When it dies, serving goes on with the last table, and its successor learns everything from the
workers, who announce themselves again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ray import serve

from cluster.config import Config
from cluster.model import load_model_spec
from cluster.shares import split_shares
from deployments.fleet import AdmissionEndpoint, FleetView, GatewayMember, ReplicaEndpoint
from routing.membership import Member, Membership

NAME = "Directory"
LONG_POLL_S = 2.0
_POLLS_UNTIL_LOST = 3


@dataclass(frozen=True)
class AttentionMember:
    """One attention replica, as it introduces itself with every long poll."""

    replica_id: str
    pid: int
    node: str
    state: str  # starting, ready (it takes requests at `url`) or draining
    url: str = ""
    token: str = ""


@dataclass(frozen=True)
class Assignment:
    """What a new expert worker is to hold: experts per layer."""

    slot: int
    experts: Mapping[int, tuple[int, ...]]


@dataclass(frozen=True)
class Standing:
    """Answer to a heartbeat: whether the directory knows the worker, and the newest published epoch (0: none)."""

    known: bool
    epoch: int


class Directory:
    """Serve replica. All decisions are `Membership`'s."""

    def __init__(self, config_json: str) -> None:
        config = Config.model_validate_json(config_json)
        spec = load_model_spec(config.model.path)
        experts = config.experts
        held = split_shares(spec.num_experts, experts.worker_shares(), experts.replicas_per_expert)
        self._slots = [dict.fromkeys(spec.moe_layers, ids) for ids in held]
        self._model = config.model.name or config.model.path.name
        self._membership = Membership(self._slots, experts.heartbeat_timeout_s, time.monotonic())
        self._attention: dict[str, tuple[AttentionMember, float]] = {}
        self._changed = asyncio.Event()
        self._gateways: dict[str, tuple[GatewayMember, float]] = {}
        self._admission: AdmissionEndpoint | None = None
        self._draining = False
        self._leaving: set[str] = set()  # nodes that are about to go
        self._view = FleetView(time.time_ns(), (), None, False)  # never a version of an earlier directory
        self._viewed = asyncio.Event()

    # --- expert workers ---

    async def join(self, worker_id: str, pid: int, node: str) -> Assignment | None:
        """The share of a new expert worker; None: all are taken, ask again."""
        slot = self._membership.join(worker_id, pid, node, time.monotonic())
        return None if slot is None else Assignment(slot, self._slots[slot])

    async def announce(self, member: Member, seen_epoch: int) -> bool:
        """See `Membership.announce`."""
        accepted = self._membership.announce(member, seen_epoch, time.monotonic())
        self._wake()
        return accepted

    async def heartbeat(self, worker_id: str) -> Standing:
        """A worker's sign of life."""
        known = self._membership.heartbeat(worker_id, time.monotonic())
        table = self._membership.table(time.monotonic())
        return Standing(known, table.epoch if table else 0)

    async def leave(self, worker_id: str) -> None:
        """A worker that ends in good order."""
        self._membership.leave(worker_id)
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
            for lost in self._membership.expire(now):
                print(f"expert worker {lost.worker_id} (pid {lost.pid} on {lost.node}) fell silent", flush=True)
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
        self._membership.expire(now)
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

    async def admission(self, endpoint: AdmissionEndpoint, after_version: int) -> FleetView | None:
        """As `gateway`, for the common admission, which says where it listens."""
        self._admission = endpoint
        self._look()
        return await self._next_view(after_version)

    async def drain(self) -> int:
        """Have every gateway refuse new requests; returns how many they still hold. Ask again until it is 0."""
        self._draining = True
        self._look()
        return _still_open(self._live_gateways())

    async def leave_node(self, node: str) -> int:
        """Have the gateways on `node` refuse new requests, and give its attention replicas none. Returns how many
        requests still need the node; ask again until it is 0. A node with neither is needed as long as a gateway that
        is leaving has requests: then the whole cluster may be going.
        """
        self._leaving.add(node)
        self._look()
        gateways = self._live_gateways()
        here = [m for m in gateways if m.node == node]
        if here:
            return _still_open(here)
        replicas = {m.replica_id for m in self._live_attention(time.monotonic()) if m.node == node}
        if replicas:
            return sum(m.in_flight.get(replica_id, 0) for m in gateways for replica_id in replicas)
        return _still_open([m for m in gateways if m.node in self._leaving])

    def _live_gateways(self) -> list[GatewayMember]:
        now = time.monotonic()
        return [m for m, heard in self._gateways.values() if now - heard < _POLLS_UNTIL_LOST * LONG_POLL_S]

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
        """Bring the view up to date; returns its version."""
        endpoints = tuple(
            ReplicaEndpoint(m.replica_id, m.url, m.token, m.pid, m.node, m.node in self._leaving)
            for m in self._live_attention(time.monotonic())
            if m.state == "ready"
        )
        view = FleetView(self._view.version, endpoints, self._admission, self._draining)
        if view != self._view:
            self._view = replace(view, version=view.version + 1)
            self._viewed.set()
            self._viewed = asyncio.Event()
        return self._view.version

    def _live_attention(self, now_s: float) -> list[AttentionMember]:
        alive = [m for m, heard in self._attention.values() if now_s - heard < _POLLS_UNTIL_LOST * LONG_POLL_S]
        self._attention = {m.replica_id: self._attention[m.replica_id] for m in alive}
        return alive

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


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
        logging_config={"enable_access_log": False},  # a line per heartbeat helps nobody
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=1.0,
        graceful_shutdown_wait_loop_s=0.1,
    )
    return deployment.bind(config.model_dump_json())
