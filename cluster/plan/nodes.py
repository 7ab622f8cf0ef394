"""The hosts that a plan is held against: this machine, or a described cluster."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ConfigError

GIB = 2**30


class NodeSpec(BaseModel):
    """One kind of host, `count` times."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    count: int = Field(1, ge=1)
    memory_gib: float = Field(gt=0)
    gpus: int = Field(0, ge=0)
    gpu_memory_gib: float = Field(0.0, ge=0)
    cores: int | None = Field(None, ge=1)  # physical; None: not told, so cores are not planned
    threads_per_core: int = Field(1, ge=1)
    numa_nodes: int = Field(1, ge=1)
    labels: dict[str, str] = Field(default_factory=dict)
    resources: dict[str, float] = Field(default_factory=dict)


def load_nodes(path: Path) -> tuple[NodeSpec, ...]:
    """A YAML list of nodes with the fields of NodeSpec, each node by itself. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the nodes in {path}: {error}") from error
    if not isinstance(data, list) or not data:
        raise ConfigError(f"{path}: expected a list of nodes, such as `- {{name: host, count: 2, memory_gib: 512}}`")
    nodes: list[NodeSpec] = []
    for position, item in enumerate(data):
        try:
            kind = NodeSpec.model_validate(item)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in (f"node {position + 1}", *first["loc"]))
            valid = f" (valid: {', '.join(NodeSpec.model_fields)})" if first["type"] == "extra_forbidden" else ""
            raise ConfigError(f"{path}: {where}: {first['msg']}{valid}") from error
        names = [kind.name] if kind.count == 1 else [f"{kind.name}-{i}" for i in range(kind.count)]
        nodes += [kind.model_copy(update={"name": name, "count": 1}) for name in names]
    return tuple(nodes)


def this_machine(labels: dict[str, str], resources: dict[str, float]) -> NodeSpec:
    """This host, with the memory that is free now and within this container's limit."""
    return NodeSpec(
        name=socket.gethostname(),
        memory_gib=max(free_memory_bytes(), 1) / GIB,
        gpus=len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        labels=labels,
        resources=resources,
    )


def free_memory_bytes(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that new processes could take: what the kernel calls available, or less where a cgroup sets a limit. File
    pages that a cgroup would give up count as free there too, or a checkpoint that was read would fill it.
    """
    free = psutil.virtual_memory().available
    for limit, used, stat in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        with contextlib.suppress(OSError, ValueError):
            left = int((cgroups / limit).read_text()) - int((cgroups / used).read_text())
            fields = dict(line.split() for line in (cgroups / stat).read_text().splitlines())
            free = min(free, left + int(fields.get("total_inactive_file", fields.get("inactive_file", 0))))
    return max(free, 0)
