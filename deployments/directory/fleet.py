"""How many expert workers and attention replicas there are to be, and which workers are to be replaced: what operators
and the load ask for while the cluster serves. Plain decisions, no Ray; the time comes in with each event.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping

from cluster.config import Config
from cluster.plan.pools import expert_pools
from deployments.directory.expert_autoscaler import ExpertAutoscaler
from deployments.directory.members import Wish
from routing.tokens.membership import Membership, WorkerMember

_ONLY_POOL = ""  # what operators call it, whatever its name

logger = logging.getLogger(__name__)


class Fleet:
    """Not thread-safe."""

    def __init__(
        self, config: Config, membership: Membership, fixed_attention: bool, version: Callable[[], int] = time.time_ns
    ) -> None:
        """`fixed_attention`: Serve's own configuration sets the number of attention replicas. `version`: of the first
        wish, later than any that somebody may still know.
        """
        self._config, self._membership = config, membership
        self._fixed_attention, self._version = fixed_attention, version
        self._pools = {pool.name: pool for pool in expert_pools(config.experts)}
        self._autoscalers = {
            name: ExpertAutoscaler(pool.autoscaling)
            for name, pool in self._pools.items()
            if pool.autoscaling is not None
        }
        self._told_why_not = ""
        self.wish: Wish | None = None  # None: as configured
        self.to_restart: list[str] = []  # expert workers, in turn

    @property
    def wanted(self) -> Mapping[str, int]:
        """Processes by role."""
        attention = self._config.attention.replicas if self.wish is None else self.wish.attention
        return {"experts": sum(self.wanted_experts.values()), "attention": attention}

    @property
    def wanted_experts(self) -> Mapping[str, int]:
        """Expert workers by pool."""
        wished = {} if self.wish is None else self.wish.experts
        return {name: wished.get(name, len(pool.slots)) for name, pool in self._pools.items()}

    def hear(self, wish: Wish | None) -> bool:
        """Follow a wish that is newer than the last; returns whether it is."""
        if wish is None or (self.wish is not None and wish.version <= self.wish.version):
            return False
        self.wish = wish
        self._membership.resize(wish.experts)
        return True

    def with_changes(self, experts: Mapping[str, int], attention: int | None) -> Wish:
        """Return the wish to have so many workers of some pools and so many replicas; None: as many as now."""
        version = self._version() if self.wish is None else self.wish.version + 1
        return Wish(version, {**self.wanted_experts, **self._named(experts)}, attention or self.wanted["attention"])

    def by_load(self, now_s: float) -> Wish | None:
        """Return what is wanted now that the workers are as busy as they are; None: nothing else."""
        changes = {}
        for name, autoscaler in self._autoscalers.items():
            present = self.wanted_experts[name]
            asked = autoscaler.wanted(self._membership.busy(name), present, now_s)
            if asked != present:
                changes[name] = asked
        if not changes:
            return None
        why_not = self._why_not_experts(changes)
        if why_not is not None and why_not != self._told_why_not:
            logger.warning("not as many expert workers as the load asks for: %s", why_not)
        self._told_why_not = why_not or ""
        return None if why_not is not None else self.with_changes(changes, None)

    def why_not(self, experts: Mapping[str, int], attention: int | None) -> str | None:
        """Return why there cannot be so many expert workers in these pools ("": in the only one) and so many attention
        replicas (None: as many as now); None if there can.
        """
        if attention is not None and self._config.attention.autoscaling is not None:
            return "attention.autoscaling is set: Serve sets the number of attention replicas"
        if attention is not None and self._fixed_attention:
            return "the Serve configuration sets the number of attention replicas: change it there"
        for name in self._named(experts):
            if name not in self._pools:
                known = " or ".join(f"experts.{one}=NUMBER" for one in self._pools)
                return f"there is no pool {name!r} of expert workers: say {known}" if name else f"say which: {known}"
        changes = {name: count for name, count in self._named(experts).items() if count != self.wanted_experts[name]}
        if any(name in self._autoscalers for name in changes):
            return "experts.autoscaling is set: the load sets the number of expert workers"
        return self._why_not_experts(changes) if changes else None

    def _named(self, experts: Mapping[str, int]) -> dict[str, int]:
        only = next(iter(self._pools)) if len(self._pools) == 1 else _ONLY_POOL
        return {only if name == _ONLY_POOL else name: count for name, count in experts.items()}

    def _why_not_experts(self, changes: Mapping[str, int]) -> str | None:
        experts, present = self._config.experts, self.wanted_experts
        total = sum({**present, **changes}.values())
        if self.to_restart:
            return "expert workers are being restarted: ask again when `deepsplit restart experts` is done"
        if total < experts.replicas_per_expert:
            return f"experts.replicas_per_expert is {experts.replicas_per_expert}: there must be as many workers"
        elastic = {name for name, pool in self._pools.items() if pool.elastic}
        members = [member for member in self._membership.members() if member.pool in elastic]
        if not changes.keys() <= elastic or any(member.state == "ready" and not member.elastic for member in members):
            return "some expert workers cannot load others' experts (GPUs, no memory, or experts.take_over is false)"
        if total > (most := self._membership.most_slots()):
            return f"there are no more than {most} copies of experts in a layer, and each worker is to hold one"
        before = sum(present[name] for name in elastic)
        part_gone = 1 - sum(changes.get(name, present[name]) for name in elastic) / before
        lacking = int(part_gone * sum(map(_held_bytes, members)))
        if lacking > (free := _free_bytes(members)):
            return f"the workers that stay would load {lacking >> 20} MiB, and their hosts have {free >> 20} MiB free"
        return None

    def restart_experts(self) -> str | None:
        """Have every expert worker replaced, one after the other. Returns why that cannot be; None if it can."""
        members = self._membership.members()
        if not self._membership.settled():
            return "expert workers start, leave, move experts, or have no memory for more (see `deepsplit status`)"
        if len(members) < 2:
            return "the only expert worker has nobody to hand its experts to: `deepsplit scale experts=2` first"
        if self._config.experts.replicas_per_expert == 1:
            elastic = [member for member in members if member.elastic]
            if len(elastic) < 2:
                return ("nobody can take a worker's experts meanwhile: it takes two workers that can load others' "
                        "(on CPU, with experts.take_over), or experts.replicas_per_expert of 2")  # fmt: skip
            most = max(map(_held_bytes, members))
            if most > (free := _free_bytes(elastic)):
                return f"the others would load {most >> 20} MiB of each, and the hosts have {free >> 20} MiB free"
        self.to_restart = [member.worker_id for member in members]
        return None

    def next_to_restart(self) -> str | None:
        """Return whose turn it is: the next one's comes when the one before is replaced and all is calm."""
        while self.to_restart and not self._membership.knows(self.to_restart[0]) and self._membership.settled():
            del self.to_restart[0]
        return self.to_restart[0] if self.to_restart else None


def _held_bytes(member: WorkerMember) -> int:
    return sum(map(len, member.held.values())) * member.expert_bytes


def _free_bytes(members: Iterable[WorkerMember]) -> int:
    free: dict[str, int] = {}
    for member in members:
        free[member.node] = max(member.free_bytes, free.get(member.node, 0))
    return sum(free.values())
