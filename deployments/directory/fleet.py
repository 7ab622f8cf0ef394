"""How many expert workers and attention replicas there are to be, and which workers are to be replaced: what operators
ask for while the cluster serves. Plain decisions, no Ray; the time comes in with each event.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.config import Config
from deployments.directory.members import Wish
from routing.tokens.membership import Membership


class Fleet:
    """Not thread-safe."""

    def __init__(self, config: Config, membership: Membership, fixed_attention: bool) -> None:
        """`fixed_attention`: Serve's own configuration sets the number of attention replicas."""
        self._config, self._membership = config, membership
        self._fixed_attention = fixed_attention
        self.wish: Wish | None = None  # None: as configured
        self.to_restart: list[str] = []  # expert workers, in turn
        # Why the number of expert workers cannot change; None if it can.
        self.fixed_experts = "`deepsplit scale` knows nothing of experts.pools" if config.experts.pools else None
        if config.experts.spares is not None:
            self.fixed_experts = "experts.spares is set: Serve sets the number of workers"

    @property
    def wanted(self) -> Mapping[str, int]:
        """Processes by role."""
        wish = self.wish
        return {
            "experts": self._config.experts.workers if wish is None else wish.experts,
            "attention": self._config.attention.replicas if wish is None else wish.attention,
        }

    def hear(self, wish: Wish | None) -> bool:
        """Follow a wish that is newer than the last; returns whether it is."""
        if wish is None or (self.wish is not None and wish.version <= self.wish.version):
            return False
        self.wish = wish
        if self.fixed_experts is None:
            self._membership.resize(wish.experts)
        return True

    def why_not(self, experts: int | None, attention: int | None) -> str | None:
        """Return why there cannot be so many processes (None: as many as now); None if there can."""
        config, members = self._config, self._membership.members()
        if attention is not None and config.attention.autoscaling is not None:
            return "attention.autoscaling is set: Serve sets the number of attention replicas"
        if attention is not None and self._fixed_attention:
            return "the Serve configuration sets the number of attention replicas: change it there"
        if experts is None or experts == self.wanted["experts"]:
            return None
        if self.to_restart:
            return "expert workers are being restarted: ask again when `deepsplit restart experts` is done"
        if self.fixed_experts is not None:
            return self.fixed_experts
        if experts < config.experts.replicas_per_expert:
            return f"experts.replicas_per_expert is {config.experts.replicas_per_expert}: there must be as many workers"
        if any(member.state == "ready" and not member.elastic for member in members):
            return "some expert workers cannot load others' experts (GPUs, no memory, or experts.take_over is false)"
        if experts > (most := self._membership.most_slots()):
            return f"there are no more than {most} copies of experts in a layer, and each worker is to hold one"
        part_gone = 1 - experts / self.wanted["experts"]
        held_bytes = sum(sum(map(len, member.held.values())) * member.expert_bytes for member in members)
        lacking = int(part_gone * held_bytes)
        if lacking > (free := self._free_bytes()):
            return f"the workers that stay would load {lacking >> 20} MiB, and their hosts have {free >> 20} MiB free"
        return None

    def _free_bytes(self) -> int:
        free: dict[str, int] = {}
        for member in self._membership.members():
            free[member.node] = max(member.free_bytes, free.get(member.node, 0))
        return sum(free.values())

    def restart_experts(self) -> str | None:
        """Have every expert worker replaced, one after the other. Returns why that cannot be; None if it can."""
        members = self._membership.members()
        if not self._membership.settled():
            return ("expert workers start, leave, move experts or cannot load others' (see `deepsplit status`), or "
                    "experts.spares is set")  # fmt: skip
        if len(members) < 2:
            return "the only expert worker has nobody to hand its experts to: `deepsplit scale experts=2` first"
        if self._config.experts.replicas_per_expert == 1:
            most = max(sum(map(len, member.held.values())) * member.expert_bytes for member in members)
            if most > (free := self._free_bytes()):
                return f"the others would load {most >> 20} MiB of each, and the hosts have {free >> 20} MiB free"
        self.to_restart = [member.worker_id for member in members]
        return None

    def next_to_restart(self) -> str | None:
        """Return whose turn it is: the next one's comes when the one before is replaced and all is calm."""
        while self.to_restart and not self._membership.knows(self.to_restart[0]) and self._membership.settled():
            del self.to_restart[0]
        return self.to_restart[0] if self.to_restart else None
