"""Places the planned processes on nodes, in their order, each where most memory is free, and says what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.plan.nodes import GIB, NodeSpec


@dataclass(frozen=True)
class Need:
    """What one process takes."""

    name: str
    role: str  # "services", "attention" or "experts"
    weights_bytes: int
    kv_cache_bytes: int
    overhead_bytes: int
    gpus: int = 0  # 0: weights and KV cache are in host memory
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    node: str | None = None  # where it fits; None: not placed

    @property
    def host_bytes(self) -> int:
        """Host memory."""
        return self.overhead_bytes + (0 if self.gpus else self.weights_bytes + self.kv_cache_bytes)

    @property
    def gpu_bytes(self) -> int:
        """Memory on each of its GPUs, without the KV cache, which takes what is left."""
        return -(-self.weights_bytes // self.gpus) if self.gpus else 0


@dataclass
class _Free:
    spec: NodeSpec
    memory: float
    gpus: int
    resources: dict[str, float]


def place(needs: Sequence[Need], nodes: Sequence[NodeSpec]) -> tuple[tuple[Need, ...], tuple[str, ...]]:
    """The needs with their nodes, and one sentence per role that does not fit, with what is missing."""
    free = [_Free(node, node.memory_gib * GIB, node.gpus, dict(node.resources)) for node in nodes]
    placed: list[Need] = []
    shortfalls: dict[str, str] = {}
    for need in needs:
        chosen = _choose(need, free)
        if isinstance(chosen, str):
            shortfalls.setdefault(need.role, chosen)
            placed.append(need)
            continue
        chosen.memory -= need.host_bytes
        chosen.gpus -= need.gpus
        for name, amount in need.resources.items():
            chosen.resources[name] -= amount
        placed.append(replace(need, node=chosen.spec.name))
    for role, first in shortfalls.items():
        of_role = [need for need in placed if need.role == role]
        left = sum(need.node is None for need in of_role)
        shortfalls[role] = f"{first} ({left} of {len(of_role)} such processes have no room)"
    return tuple(placed), tuple(shortfalls.values())


def _choose(need: Need, free: Sequence[_Free]) -> _Free | str:
    """A node, or why there is none."""
    fitting = [node for node in free if need.labels.items() <= node.spec.labels.items()]
    if not fitting:
        return f"{need.name}: no node has the labels {dict(need.labels)}"
    fitting = [n for n in fitting if all(n.resources.get(name, 0) >= need.resources[name] for name in need.resources)]
    if not fitting:
        return f"{need.name}: no node has the resources {dict(need.resources)} left"
    if need.gpus:
        fitting = [node for node in fitting if node.gpus >= need.gpus]
        if not fitting:
            return f"{need.name}: no node has {need.gpus} GPUs left"
        largest = max(node.spec.gpu_memory_gib for node in fitting)
        # 0: unknown, as on this machine.
        if largest and need.gpu_bytes > largest * GIB:
            missing = need.gpu_bytes - largest * GIB
            return f"{need.name}: needs {gib(need.gpu_bytes)} per GPU, {gib(missing)} more than the largest GPU has"
    best = max(fitting, key=lambda node: node.memory)
    if best.memory < need.host_bytes:
        missing = need.host_bytes - max(best.memory, 0)
        return (
            f"{need.name}: needs {gib(need.host_bytes)} of memory, but {best.spec.name}, the node with most room, has "
            f"{gib(max(best.memory, 0))} left: {gib(missing)} short"
        )
    return best


def gib(amount: float) -> str:
    """Bytes as text."""
    return f"{amount / GIB:.2f} GiB" if amount >= GIB / 10 else f"{amount / 2**20:.1f} MiB"
