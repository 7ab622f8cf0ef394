"""An expert worker: a Serve replica that holds a share of the routed experts and answers dispatches.

Stateless between calls, and light: it imports torch but never vLLM, because its restart is the failover time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import os
import time
import uuid
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.addresses import bracketed
from cluster.config import Config
from cluster.errors import DeepsplitError
from cluster.plan.compute_processes import expert_process, plan_whole_host
from cluster.plan.cores import CoreShare
from cluster.plan.host_cores import this_host
from cluster.plan.nodes import free_memory_bytes
from cluster.plan.pools import Pool, expert_pools
from deployments.directory.calls import DirectoryAway, answer_of, over_grpc
from deployments.directory.members import Assignment, Heartbeat, HeartbeatReply, Orders, Wish
from deployments.experts.vital_signs import VitalSigns
from deployments.hosting.autoscaling import WISH, WISH_VERSION, on_wish
from deployments.hosting.process_cores import ProcessCores, cores_folder, waiting_environment
from deployments.hosting.scrape import scrape_process
from deployments.hosting.serve_logs import start_logging
from monitoring.expert_meter import ExpertMeter
from monitoring.exporter import ProcessRegistry
from monitoring.metrics import ExpertMetrics
from routing.tokens.channel import GRPC_ENVIRONMENT
from routing.tokens.membership import WorkerMember
from routing.tokens.placement import NO_TABLE, PlacementTable, WorkerEndpoint
from routing.tokens.share import Share, first_bytes, without

if TYPE_CHECKING:
    from deployments.experts.host import ExpertHost

NAME = "experts"
JOIN_RETRY_S = 0.25
_STEP_BYTES = 256 << 20  # of weights that are loaded at run time before the directory hears of them
_RETRY_LOAD_S = 30.0  # after a load that failed, or had no memory
_LEAST_FREE_BYTES = 512 << 20  # of the host's memory, after such a step
CALL_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class ExpertWorker:
    """Serve replica. It serves gRPC on a port of its own; Serve only starts, watches and stops it."""

    # Serve awaits an async constructor.
    async def __init__(  # type: ignore[misc]
        self,
        config_json: str,
        directory: DeploymentHandle,
        pool: str,
        planned: tuple[CoreShare, ...] | None = None,
    ) -> None:
        """`pool`: the name of the worker's pool; the directory gives it one of its slots. `planned`: cores of all
        compute processes of this host, if they are known.
        """
        config = Config.model_validate_json(config_json)
        started = time.monotonic()
        self._directory = over_grpc(directory)
        self._heartbeat_interval_s = config.experts.heartbeat_interval_s
        self._from_peers = config.experts.from_peers
        self._listen_host = config.experts.host or config.own_host(ray.util.get_node_ip_address())
        self._hand_over_timeout_s = config.experts.hand_over_timeout_s
        self._seen = NO_TABLE
        self._pool = pool
        self._draining = False
        self._wish: Wish | None = None
        self._failure: str | None = None
        self._left = False  # the directory knows that it goes
        self._load_again_s = 0.0  # monotonic
        self._registering = asyncio.Lock()
        self._said: WorkerMember | None = None  # what the directory has accepted last
        self._restarting: asyncio.Task[None] | None = None
        self._orders: Orders | None = None
        self._told = asyncio.Event()
        worker_id, node = f"experts-{uuid.uuid4().hex[:8]}", ray.util.get_node_ip_address()
        start_logging(config.logging, "experts", worker_id)
        assignment = await self._join(worker_id, os.getpid(), node)
        # Heartbeats and metrics from now on: a real checkpoint loads for minutes.
        registry = ProcessRegistry()
        meter = ExpertMeter(ExpertMetrics(registry))
        self._scrape = scrape_process(registry, "experts", worker_id, node, config)
        # Huge pages for weights: a decode step reads them all (4-10 % of a GEMM's time). Read when torch is loaded.
        os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
        process = expert_process(config.experts, assignment.slot)
        self._cores = None if process is None else ProcessCores(process, this_host(), cores_folder(), planned)
        threads = {"OMP_NUM_THREADS": str(config.experts.threads), **waiting_environment(spin=False)}
        # Read when torch is loaded: below, not yet here.
        os.environ.update(threads if self._cores is None else self._cores.environment())
        if self._cores is not None:
            self._cores.start()  # so that the threads that load have the same cores, and memory of their NUMA node
        self._member = WorkerMember(
            worker_id, assignment.slot, os.getpid(), node, "", "loading", scrape=self._scrape.target,
            cores=self._cores_now(), share=assignment.experts, zone=_zone(), pool=pool,
        )  # fmt: skip
        with contextlib.suppress(DirectoryAway):
            await self._register()
        self._beating = asyncio.create_task(self._beat())

        self._host = await asyncio.to_thread(_load, config, assignment.experts, meter, await self._holders())
        registry.before_scrape(self._host.measure)
        address = self._host.start(self._listen_host)
        self._member = dataclasses.replace(
            self._member, address=address, state="ready", form=self._host.form, held=self._host.held,
            elastic=self._host.elastic and config.experts.take_over, expert_bytes=self._host.expert_bytes,
        )  # fmt: skip
        with contextlib.suppress(DirectoryAway):  # the next heartbeat will register it
            await self._register()
        logger.info(
            "expert worker ready at %s after %.1f s: slot %d, %s", address, time.monotonic() - started,
            assignment.slot, self._host.loaded,
        )  # fmt: skip
        if self._member.elastic:
            self._obeying = asyncio.create_task(self._obey())

    async def _join(self, worker_id: str, pid: int, node: str) -> Assignment:
        while True:
            with contextlib.suppress(DirectoryAway):
                asked = self._directory.join.remote(worker_id, pid, node, self._pool)
                assignment: Assignment | None = await answer_of(asked, CALL_TIMEOUT_S)
                if assignment is not None:
                    return assignment
            await asyncio.sleep(JOIN_RETRY_S)

    async def _holders(self) -> tuple[WorkerEndpoint, ...]:
        """Return the workers from which this one may load experts: on other hosts. Those of this one have the same disk
        and processor, and loading from both at once was slower there (benchmarks/expert_loading.py).
        """
        if self._from_peers:
            with contextlib.suppress(DirectoryAway):
                encoded = await answer_of(self._directory.placement.remote(), CALL_TIMEOUT_S)
                if encoded is not None:
                    holders, own = PlacementTable.decode(encoded).holders(), bracketed(self._listen_host)
                    return tuple(one for one in holders if one.address.rpartition(":")[0] != own)
        return ()

    async def _register(self) -> None:
        async with self._registering:  # or an older word could be the last
            member = self._member = dataclasses.replace(self._member, cores=self._cores_now())
            accepted = await answer_of(self._directory.register_worker.remote(member, self._seen), CALL_TIMEOUT_S)
        if accepted:
            self._said = member
        else:
            self._failure = f"slot {self._member.slot} was given to another worker while this one sent no heartbeats"

    def _cores_now(self) -> str:
        return "" if self._cores is None else str(self._cores.share)

    async def _beat(self) -> None:
        signs = VitalSigns(time.monotonic())
        while True:
            host = getattr(self, "_host", None)  # not there while it loads
            if self._failure is None and host is not None:
                self._failure = host.failure()
            if self._failure is not None:
                break
            said = (0.0, 0.0) if host is None else signs.since_last(host.busy_s(), host.work(), time.monotonic())
            heard = 0 if self._orders is None else self._orders.number
            beat = Heartbeat(self._member.worker_id, *said, free_memory_bytes(), heard, self._wish)
            try:
                asked = self._directory.heartbeat.remote(beat)  # which it answers in the interval's time
                reply: HeartbeatReply = await answer_of(asked, self._heartbeat_interval_s + CALL_TIMEOUT_S)
                self._seen = self._seen if reply.stamp == NO_TABLE else reply.stamp
                self._wish = reply.wish or self._wish
                if reply.orders is not None:
                    self._orders = reply.orders
                    self._told.set()
                if reply.restart and self._restarting is None:
                    self._restarting = asyncio.create_task(self._restart())
                if not reply.known or self._member.cores != self._cores_now():
                    await self._register()
                self._draining = reply.draining
                if reply.restart or reply.draining:
                    await asyncio.sleep(self._heartbeat_interval_s)  # it is answered at once now
            except DirectoryAway as error:
                logger.warning("the directory is away (%s); serving goes on", error)
                await asyncio.sleep(self._heartbeat_interval_s)
        await self._leave(CALL_TIMEOUT_S)  # so that the table has others, and a new process may have the slot

    async def _leave(self, timeout_s: float) -> None:
        with contextlib.suppress(DirectoryAway):
            await answer_of(self._directory.leave.remote(self._member.worker_id), timeout_s)
            self._left = True

    async def _obey(self) -> None:
        """Hold what the directory wants this worker to hold, as far as it can. Where it could not, try again later."""
        while True:
            try:
                left_s = None if self._member.elastic else max(0.0, self._load_again_s - time.monotonic())
                await asyncio.wait_for(self._told.wait(), left_s)
            except TimeoutError:
                self._member = dataclasses.replace(self._member, elastic=True)
            self._told.clear()
            while (orders := self._orders) is not None:
                try:
                    if not await self._step_to(orders):
                        break
                except DirectoryAway:
                    await asyncio.sleep(JOIN_RETRY_S)

    async def _step_to(self, orders: Orders) -> bool:
        """Drop what is not to be kept, or else load some of what is, and say so. Returns False if there was nothing to
        do.
        """
        host, keeps = self._host, orders.keeps
        extra, missing = without(host.held, keeps), first_bytes(without(keeps, host.held), _STEP_BYTES, host.nbytes_of)
        if extra:
            await asyncio.to_thread(host.drop, extra)
            logger.info("dropped %d experts that others hold now", sum(map(len, extra.values())))
        elif missing and self._member.elastic:
            count, nbytes = sum(map(len, missing.values())), host.nbytes_of(missing)
            if nbytes + _LEAST_FREE_BYTES > (free := free_memory_bytes()):
                self._stay_as_is(f"{count} more experts have {nbytes >> 20} MiB, and {free >> 20} MiB are free")
            else:
                began_s = time.monotonic()
                try:
                    loaded = await asyncio.to_thread(host.load, missing, await self._holders())
                except (DeepsplitError, OSError) as error:
                    self._stay_as_is(str(error))
                else:
                    took_s = time.monotonic() - began_s
                    logger.info("loaded %d more experts, %d MiB in %.1f s: %s", count, nbytes >> 20, took_s, loaded)
        elif self._member.share == orders.share and self._member == self._said:
            return False
        self._member = dataclasses.replace(self._member, held=host.held, share=orders.share)
        await self._register()
        return True

    def _stay_as_is(self, why: str) -> None:
        logger.warning("this worker takes no more experts for %g s: %s", _RETRY_LOAD_S, why)
        self._member = dataclasses.replace(self._member, elastic=False)
        self._load_again_s = time.monotonic() + _RETRY_LOAD_S

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve what it needs when it sets the number of workers."""
        wish = self._wish
        wanted = None if wish is None else wish.experts.get(self._pool)
        return {} if wish is None or wanted is None else {WISH: float(wanted), WISH_VERSION: float(wish.version)}

    async def check_health(self) -> None:
        """Raise if this worker must be replaced; Serve does so."""
        for name in ("_beating", "_obeying", "_restarting"):
            task = getattr(self, name, None)
            if self._failure is None and task is not None and task.done():
                ended = "cancelled" if task.cancelled() else repr(task.exception())
                self._failure = f"the task {name.strip('_')} ended: {ended}"
        host = getattr(self, "_host", None)  # not there while it loads
        if self._failure is None and host is not None:
            self._failure = host.failure()
        if self._failure is not None:
            raise RuntimeError(self._failure)

    async def _hand_over(self, timeout_s: float, whatever_comes: bool) -> None:
        """Serve on until other workers hold what only this one holds, and every attention replica has a table that says
        so. `whatever_comes`: the worker is about to end anyway, so if nobody can take its experts, or the directory
        does not come back soon, it need not wait.
        """
        deadline, away_since = time.monotonic() + timeout_s, math.inf
        while time.monotonic() < deadline and not self._draining:
            try:
                asked = self._directory.retire.remote(self._member.worker_id, whatever_comes)
                if await answer_of(asked, CALL_TIMEOUT_S):
                    return
                away_since = math.inf
            except DirectoryAway:
                away_since = min(away_since, time.monotonic())
                if whatever_comes and time.monotonic() - away_since > CALL_TIMEOUT_S:
                    break
            await asyncio.sleep(JOIN_RETRY_S)
        if not self._draining:
            logger.warning("leaving, although no other worker holds all of this one's experts yet")

    async def _restart(self) -> None:
        """Hand over, however long it takes, then have Serve replace this process, by failing its health check."""
        await self._hand_over(math.inf, whatever_comes=False)
        self._failure = "it was told to restart, and others hold its experts"

    async def __del__(self) -> None:
        host = getattr(self, "_host", None)
        if hasattr(self, "_member") and not self._left:
            if host is not None and self._failure is None:
                await self._hand_over(self._hand_over_timeout_s, whatever_comes=True)
            await self._leave(1.0)
        for name in ("_beating", "_obeying", "_restarting"):
            if (task := getattr(self, name, None)) is not None:
                task.cancel()
        if host is not None:
            await asyncio.to_thread(host.stop, 1.0)
        if (cores := getattr(self, "_cores", None)) is not None:
            cores.close()
        scrape = getattr(self, "_scrape", None)
        if scrape is not None:
            scrape.stop()


def _zone() -> str:
    """The availability zone of this node, as Ray knows it; empty where it does not."""
    labels = ray.get_runtime_context().get_node_labels()
    return str(labels.get("ray.io/availability-zone", ""))


def _load(
    config: Config, experts: Share, meter: ExpertMeter, holders: tuple[WorkerEndpoint, ...]
) -> ExpertHost:
    """Load the weights. Called in a thread, because the event loop must go on with heartbeats; imports torch there."""
    from deployments.experts.host import ExpertHost

    return ExpertHost(config, experts, meter, holders)


def expert_deployments(config: Config, directory: serve.Application) -> tuple[serve.Application, ...]:
    """Return the expert workers, bound: one deployment per pool."""
    return tuple(_deployment(config, pool, directory) for pool in expert_pools(config.experts))


def _deployment(config: Config, pool: Pool, directory: serve.Application) -> serve.Application:
    experts, placement = pool.experts, pool.experts.placement
    options: dict[str, Any] = {
        "num_cpus": experts.threads if placement.num_cpus is None else placement.num_cpus,
        "resources": dict(placement.resources),
        "runtime_env": {"env_vars": GRPC_ENVIRONMENT},
    }
    if experts.device == "cuda":
        options["num_gpus"] = 1 if placement.num_gpus is None else placement.num_gpus
    if placement.labels:
        options["label_selector"] = dict(placement.labels)
    deployment = serve.deployment(
        ExpertWorker,
        name=f"{NAME}-{pool.name}" if pool.name else NAME,
        num_replicas=None if pool.elastic else len(pool.slots),
        autoscaling_config=on_wish(len(pool.slots)) if pool.elastic else None,
        max_replicas_per_node=experts.max_per_node,
        ray_actor_options=options,
        max_ongoing_requests=1,  # Serve sends it none
        logging_config=config.logging.of_serve,
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=experts.hand_over_timeout_s + 3.0,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=2 * len(pool.slots),  # Serve counts over all replicas
    )
    own = config.model_copy(update={"experts": experts}).model_dump_json()
    planned = plan_whole_host(config, this_host()).shares if config.ray.address is None else None
    return deployment.bind(own, directory, pool.name, planned)
