"""The directory: one small Serve replica that knows which processes there are. It publishes the placement table to the
attention replicas, and the attention replicas to the gateways.

It is off the hot path. When it dies, serving goes on with the last table, and its successor learns everything from the
workers and replicas, which register again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, replace

import ray
from ray import serve

from cluster.config import Config
from cluster.model.spec import load_model_spec
from cluster.plan.pools import expert_pools
from cluster.plan.shares import split_shares
from deployments.directory.fleet import Fleet
from deployments.directory.members import (
    AdmissionEndpoint,
    Assignment,
    AttentionMember,
    ClusterView,
    Demand,
    GatewayMember,
    Heartbeat,
    HeartbeatReply,
    Orders,
    Wish,
)
from deployments.directory.ray_agents import RayAgents
from deployments.directory.rebalancer import Rebalancer
from deployments.directory.registry import Registry
from deployments.directory.worker_watch import WorkerWatch
from deployments.hosting.scrape import scrape_process
from deployments.hosting.serve_logs import start_logging
from monitoring.discovery import ScrapeTarget
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import DirectoryMetrics
from routing.tokens.membership import Membership, WorkerMember
from routing.tokens.placement import NO_TABLE, Stamp
from routing.tokens.routed_tokens import RoutedTokens

NAME = "Directory"
LONG_POLL_S = 2.0
_POLLS_UNTIL_LOST = 3
_UNHEARD = Stamp(1, 0)  # of no directory: what a replica uses that was not heard yet
_SILENCE_CHECK_S = 0.25  # how often a long poll looks for workers that fell silent

logger = logging.getLogger(__name__)


class Directory:
    """Serve replica: long polls, metrics and logs around `Membership` and `Registry`, which decide."""

    def __init__(self, config_json: str, fixed_attention: bool = False) -> None:
        """`fixed_attention`: Serve's own configuration sets the number of attention replicas."""
        config = Config.model_validate_json(config_json)
        start_logging(config.logging, "directory")
        spec = load_model_spec(config.model.path)
        experts = config.experts
        held = split_shares(spec.num_experts, experts.worker_shares(), experts.replicas_per_expert)
        shares = [dict.fromkeys(spec.moe_layers, ids) for ids in held]  # by slot
        pools = expert_pools(experts)
        self._started_s = time.monotonic()
        self._heartbeat_interval_s = experts.heartbeat_interval_s
        self._model = config.model.served_name
        self._membership = Membership(
            shares, experts.heartbeat_timeout_s, time.monotonic(), secrets.randbits(63) + 1, self._on_lost,
            [pool.name for pool in pools for _ in pool.slots], [pool.name for pool in pools if not pool.elastic],
        )  # fmt: skip
        self._fleet = Fleet(config, self._membership, fixed_attention)
        self._registry = Registry(_POLLS_UNTIL_LOST * LONG_POLL_S, first_version=time.time_ns())
        self._rebalancer: Rebalancer | None = None
        self._rebalancing: asyncio.Task[None] | None = None  # from the first load on
        self._autoscaling: asyncio.Task[None] | None = None  # from the first worker on
        self._tables_in_use: dict[str, Stamp] = {}  # by attention replica; NO_TABLE before the first
        self._table_changed = asyncio.Event()
        self._view_changed = asyncio.Event()
        node = ray.util.get_node_ip_address()
        process = ProcessRegistry()
        self._metrics = DirectoryMetrics(process)
        self._metrics.members_wanted.labels("experts").set(experts.workers)
        self._metrics.members_wanted.labels("attention").set(config.attention.replicas)
        self._metrics.members_wanted.labels("gateway").set(config.gateway.replicas)
        for event in ("joined", "ready", "left", "lost"):  # from 0 on, or rates miss the first
            self._metrics.worker_events.labels(event)
        if experts.rebalance.enabled:
            layers = spec.moe_layers
            self._rebalancer = Rebalancer(experts, layers, spec.num_experts, self._membership, self._metrics)
        self._scrape = scrape_process(process, "directory", "", node, config)
        self._agents = RayAgents()
        self._watch = WorkerWatch(config.dispatch, config.internal_tls, self._worker_ended)

    # --- expert workers ---

    async def join(self, worker_id: str, pid: int, node: str, pool: str) -> Assignment | None:
        """Assign a slot of its pool to a new expert worker. Returns None if all are taken: ask again."""
        slot = self._membership.join(worker_id, pid, node, time.monotonic(), pool)
        if slot is None:
            return None
        self._metrics.worker_events.labels("joined").inc()
        self._update()
        return Assignment(slot, self._membership.share(slot))

    async def register_worker(self, member: WorkerMember, seen: Stamp) -> bool:
        """Record an expert worker's state; see `Membership.register`."""
        was_ready = self._membership.is_ready(member.worker_id)
        accepted = self._membership.register(member, seen, time.monotonic())
        if accepted and self._membership.is_ready(member.worker_id) and not was_ready:
            self._metrics.worker_events.labels("ready").inc()
        self._publish_table()
        return accepted

    async def heartbeat(self, beat: Heartbeat) -> HeartbeatReply:
        """Record an expert worker's sign of life, and answer when there is something new to do, or after
        experts.heartbeat_interval_s: then the next one comes.
        """
        worker_id, now = beat.worker_id, time.monotonic()
        if self._autoscaling is None:
            self._autoscaling = asyncio.create_task(self._follow_load())
        self._hear(beat.wish)
        self._membership.heartbeat(worker_id, beat.busy, now, beat.speed, beat.free_bytes)
        deadline = now + self._heartbeat_interval_s
        while True:
            reply = self._reply_to(beat)
            news = reply.orders is not None or reply.restart or reply.draining or reply.wish != beat.wish
            if not reply.known or news or time.monotonic() >= deadline:
                return reply
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._table_changed.wait(), deadline - time.monotonic())

    def _reply_to(self, beat: Heartbeat) -> HeartbeatReply:
        worker_id, membership = beat.worker_id, self._membership
        table, known = membership.table(), membership.knows(worker_id)
        orders = None
        if known and (number := membership.orders(worker_id)) != beat.heard:
            orders = Orders(number, membership.keeps(worker_id), membership.share_of(worker_id))
        stamp, restart = table.stamp if table else NO_TABLE, worker_id == self._fleet.next_to_restart()
        draining = self._registry.draining
        return HeartbeatReply(known, stamp, orders, self._fleet.wish, restart, draining)

    async def retire(self, worker_id: str, whatever_comes: bool) -> bool:
        """Have an expert worker's experts move to others, since it is about to leave (`whatever_comes`: also if nobody
        can take them). Returns whether it may leave.
        """
        if self._registry.draining:
            return True
        may_leave = self._membership.retire(worker_id, whatever_comes)
        self._publish_table()
        return may_leave

    async def leave(self, worker_id: str) -> None:
        """Remove an expert worker that ends in good order."""
        self._membership.leave(worker_id)
        self._metrics.worker_events.labels("left").inc()
        self._publish_table()

    # --- attention replicas and operators ---

    async def register_replica(self, member: AttentionMember) -> None:
        """Record what an attention replica says of itself, with each poll and whenever it changes."""
        self._registry.register_replica(member, time.monotonic())
        self._update()

    async def placement(self) -> bytes | None:
        """Return the present placement table, encoded; None while some experts have no worker."""
        table = self._membership.table()
        return None if table is None else table.encoded

    async def poll_table(
        self, after: Stamp, member: AttentionMember | None = None, tokens: RoutedTokens | None = None
    ) -> tuple[Stamp, bytes] | None:
        """Register the replica, with the tokens that its experts had since its start, and wait for a placement table
        with another stamp than `after`, which is returned encoded. Returns None after LONG_POLL_S: ask again.
        """
        self._membership.observe(after)
        if self._rebalancer is not None and member is not None and tokens is not None:
            try:
                self._rebalancer.report(member.replica_id, tokens, time.monotonic())
            except ValueError as error:  # such as of another model: the table is more important
                logger.warning("tokens of %s do not count: %s", member.replica_id, error)
            if self._rebalancing is None:
                self._rebalancing = asyncio.create_task(self._rebalance(self._rebalancer))
        if member is not None:
            await self.register_replica(member)
            self._follow(member.replica_id, after)
        deadline = time.monotonic() + LONG_POLL_S
        while True:
            now = time.monotonic()
            self._expire(now)
            table = self._membership.table()
            if table is not None and table.stamp != after:
                if member is not None and after == NO_TABLE:
                    self._follow(member.replica_id, table.stamp)
                return table.stamp, table.encoded
            if now >= deadline:
                return None
            # The event tells of registrations; silence tells of itself only to those who look.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._table_changed.wait(), min(_SILENCE_CHECK_S, deadline - now))

    def _follow(self, replica_id: str, stamp: Stamp) -> None:
        """Take note of the oldest table that a replica may still use."""
        self._tables_in_use[replica_id] = stamp
        self._expire(time.monotonic())

    async def status(self) -> str:
        """Return the state of both planes as JSON; `deepsplit status` prints it."""
        self._expire(time.monotonic())
        table = self._membership.table()
        last = None if self._rebalancer is None else self._rebalancer.last
        return json.dumps(
            {
                "model": self._model,
                "wanted": dict(self._fleet.wanted),
                "to_restart": self._fleet.to_restart,
                "placement_epoch": table.stamp.n if table else 0,
                "attention": [
                    {"id": m.replica_id, "pid": m.pid, "node": m.node, "state": m.state, "cores": m.cores}
                    for m in self._registry.replicas()
                ],
                "experts": [
                    {
                        "id": m.worker_id, "pool": m.pool, "pid": m.pid, "node": m.node, "address": m.address,
                        "state": m.state, "cores": m.cores, "form": m.form,
                        "experts": {str(layer): ids for layer, ids in m.held.items()},
                    }
                    for m in self._membership.members()
                ],
                "rebalanced": None if last is None else asdict(last),
            }
        )  # fmt: skip

    # --- gateways ---

    async def register_gateway(self, member: GatewayMember, after_version: int) -> ClusterView | None:
        """Register the gateway and wait for a view whose version is not `after_version`. Returns None after
        LONG_POLL_S: ask again. A gateway that drains is answered at once, so that `drain` and `leave_node` see its
        progress.
        """
        self._registry.register_gateway(member, time.monotonic())
        view = self._registry.view if self._registry.drains(member) else await self._next_view(after_version)
        return replace(view, draining=True) if view is not None and self._registry.drains(member) else view

    async def register_admission(
        self, endpoint: AdmissionEndpoint, scrape: ScrapeTarget, after_version: int, demand: float
    ) -> ClusterView | None:
        """Do the same for the common admission, which says where it listens and what is asked of it."""
        self._registry.register_admission(endpoint, scrape, demand, time.monotonic())
        return await self._next_view(after_version)

    async def demand(self, heard: Wish | None) -> Demand:
        """Return what attention replicas pass on to Serve. `heard`: the wish that this one heard of last."""
        self._hear(heard)
        self._registry.expire(time.monotonic())
        return Demand(self._registry.demand(), self._fleet.wish)

    # --- what operators ask for ---

    async def scale(self, experts: Mapping[str, int], attention: int | None) -> str:
        """Have so many expert workers (by pool; "": of the only one) and attention replicas (None: as many as now) from
        now on. Returns why that cannot be, empty if it can. A directory that has just been started first waits for
        everybody who may know an earlier wish.
        """
        await asyncio.sleep(self._until_heard_s())
        why_not = self._fleet.why_not(experts, attention)
        if why_not is None:
            self._hear(self._fleet.with_changes(experts, attention))
        return why_not or ""

    async def restart_experts(self) -> str:
        """Have every expert worker end and Serve start another, one after the other, each when all others hold its
        experts. Returns why that cannot be, empty if it can.
        """
        return self._fleet.restart_experts() or ""

    def _hear(self, wish: Wish | None) -> None:
        if not self._fleet.hear(wish):
            return
        wanted = self._fleet.wanted
        logger.info("%d expert workers and %d attention replicas are wanted", wanted["experts"], wanted["attention"])
        for role, count in wanted.items():
            self._metrics.members_wanted.labels(role).set(count)
        self._publish_table()

    async def drain(self) -> int:
        """Have every gateway refuse new requests. Returns how many they still hold; ask again until it is 0."""
        self._registry.drain()
        self._update()
        self._wake_those_who_wait()
        return self._registry.open_requests()

    async def leave_node(self, node: str, settled: bool) -> int:
        """Prepare for the end of `node`: its expert workers hand over, and once `settled`, its gateways refuse new
        requests and its attention replicas get none. Returns how many requests and workers still need the node; ask
        again until it is 0.
        """
        self._registry.leave_node(node, settled)
        self._expire(time.monotonic())
        here = [member.worker_id for member in self._membership.members() if member.node == node]
        waiting = sum(not self._membership.retire(worker_id) for worker_id in here)
        self._publish_table()
        return self._registry.requests_that_need(node) + waiting

    async def _next_view(self, after_version: int) -> ClusterView | None:
        deadline = time.monotonic() + LONG_POLL_S
        while True:
            self._update()
            if self._registry.view.version != after_version:
                return self._registry.view
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._view_changed.wait(), left_s)

    # --- bookkeeping ---

    def _until_heard_s(self) -> float:
        """Seconds until everybody who is alive has reported to this directory; 0 from then on."""
        return max(0.0, self._started_s + _POLLS_UNTIL_LOST * LONG_POLL_S - time.monotonic())

    def _expire(self, now_s: float) -> None:
        self._membership.expire(now_s)
        self._registry.expire(now_s)
        live = {replica.replica_id for replica in self._registry.replicas()}
        self._tables_in_use = {name: used for name, used in self._tables_in_use.items() if name in live}
        used = list(self._tables_in_use.values())
        if self._until_heard_s() > 0:
            used.append(_UNHEARD)  # attention replicas that have not polled yet may use an earlier directory's table
        self._membership.followed(used)
        if self._rebalancer is not None:
            self._rebalancer.keep_only(live)

    async def _rebalance(self, rebalancer: Rebalancer) -> None:
        while True:
            try:
                if await rebalancer.run():
                    self._publish_table()
            except Exception:  # whatever is wrong with it, everything else goes on
                logger.exception("the load of the experts was not balanced")

    async def _follow_load(self) -> None:
        """Have as many expert workers as the load asks for, where the configuration says so."""
        await asyncio.sleep(self._until_heard_s())
        while True:
            try:
                self._hear(self._fleet.by_load(time.monotonic()))
            except Exception:  # whatever is wrong with it, everything else goes on
                logger.exception("the number of expert workers does not follow the load")
            await asyncio.sleep(self._heartbeat_interval_s)

    def _worker_ended(self, worker_id: str) -> None:
        self._membership.lose(worker_id)
        self._publish_table()

    def _on_lost(self, member: WorkerMember) -> None:
        self._metrics.worker_events.labels("lost").inc()
        fields = {"worker_id": member.worker_id, "worker_pid": member.pid, "worker_node": member.node}
        logger.warning("an expert worker is lost", extra={"fields": fields})
        self._update_metrics()

    def _wake_those_who_wait(self) -> None:
        """Answer heartbeats, and polls for a table, to which there is something new."""
        self._table_changed.set()
        self._table_changed = asyncio.Event()

    def _publish_table(self) -> None:
        """Wake the attention replicas that wait for a table."""
        self._wake_those_who_wait()
        self._update()
        self._update_metrics()

    def _update(self) -> None:
        """Bring the view up to date, and the metrics with it; wake the gateways that wait for a view."""
        now = time.monotonic()
        self._expire(now)
        members = self._membership.members()
        self._watch.watch({member.worker_id: member.address for member in members if member.address})
        workers = [member.scrape for member in members if member.scrape is not None]
        self._agents.refresh(now)
        if self._registry.update_view([self._scrape.target, *workers, *self._agents.targets]):
            self._view_changed.set()
            self._view_changed = asyncio.Event()
            self._update_metrics()

    def _update_metrics(self) -> None:
        metrics, table = self._metrics, self._membership.table()
        metrics.epoch.set(table.stamp.n if table else 0)
        metrics.uncovered.set(self._membership.uncovered())
        for state in ("loading", "ready"):
            members = [m for m in self._membership.members() if (m.state == "loading") == (state == "loading")]
            metrics.members.labels("experts", state).set(len(members))
        for state in ("starting", "ready", "draining"):
            metrics.members.labels("attention", state).set(sum(m.state == state for m in self._registry.replicas()))
        for state, draining in (("ready", False), ("draining", True)):
            gateways = self._registry.gateways()
            metrics.members.labels("gateway", state).set(sum(m.draining == draining for m in gateways))


def directory_deployment(config: Config, fixed_attention: bool) -> serve.Application:
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
    return deployment.bind(config.model_dump_json(), fixed_attention)
