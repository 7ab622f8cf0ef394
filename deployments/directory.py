"""The directory: one small Serve replica that knows who holds which experts and publishes the placement table.

Off the hot path. When it dies, serving goes on with the last table, and its successor learns everything from the
workers, who announce themselves again.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from ray import serve

from cluster.config import Config
from cluster.model import load_model_spec
from cluster.shares import split_shares
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
    state: str


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

    async def table(self, after_epoch: int, member: AttentionMember | None = None) -> str | None:
        """The placement table as JSON once its epoch is above `after_epoch`; None after LONG_POLL_S (ask again)."""
        self._membership.saw(after_epoch)
        deadline = time.monotonic() + LONG_POLL_S
        while True:
            now = time.monotonic()
            if member is not None:
                self._attention[member.replica_id] = (member, now)
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
        alive = [m for m, heard in self._attention.values() if now - heard < _POLLS_UNTIL_LOST * LONG_POLL_S]
        self._attention = {m.replica_id: self._attention[m.replica_id] for m in alive}
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

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


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
