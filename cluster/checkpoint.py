"""The tensors of a checkpoint by name, shard and byte range, without reading them. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100 << 20  # the bound of the safetensors library itself

Projection = Literal["gate", "up", "down"]

# model.layers.3.mlp.experts.17.gate_proj.weight (DeepSeek, Qwen-MoE, GLM, Kimi; any prefix), and Mixtral's
# model.layers.3.block_sparse_moe.experts.17.w1.weight.
_EXPERT = re.compile(
    r"(?:^|\.)layers\.(?P<layer>\d+)\.(?:.+\.)?experts\.(?P<expert>\d+)\."
    r"(?P<proj>gate_proj|up_proj|down_proj|w1|w2|w3)\.(?P<kind>weight|weight_scale_inv)$"
)
# Whatever belongs to one routed expert, biases and unknown scales included.
_ROUTED = re.compile(r"(?:^|\.)layers\.\d+\.(?:.+\.)?experts\.\d+\.")
_PROJECTIONS: dict[str, Projection] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of one routed expert."""

    layer: int
    expert: int
    proj: Projection
    kind: Literal["weight", "scale"]
    name: str
    shard: str


@dataclass(frozen=True)
class CheckpointIndex:
    """Which shard holds which tensor. The shards themselves need not be there for planning."""

    path: Path
    weight_map: Mapping[str, str]
    expert_tensors: Mapping[tuple[int, int], tuple[ExpertTensor, ...]]  # (layer, expert)
    total_size: int | None  # bytes of all tensors, where the index says so


def is_routed_expert(name: str) -> bool:
    """Whether a tensor belongs to a routed expert: what attention never reads."""
    return _ROUTED.search(name) is not None


def load_checkpoint_index(path: Path | str) -> CheckpointIndex:
    """Read `model.safetensors.index.json`, or the header of a single `model.safetensors`. Raises CheckpointError."""
    path = Path(path)
    if (path / INDEX).exists():
        try:
            data = json.loads((path / INDEX).read_text())
            weight_map = dict(data["weight_map"])
            total_size = (data.get("metadata") or {}).get("total_size")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path / INDEX} is not a safetensors index ({error!r}): download it again") from None
    elif (path / SINGLE).exists():
        weight_map = dict.fromkeys(read_header(path / SINGLE), SINGLE)
        total_size = None
    else:
        raise CheckpointError(f"{path} has neither {INDEX} nor {SINGLE}: only safetensors checkpoints can be split")
    experts: dict[tuple[int, int], list[ExpertTensor]] = {}
    for name, shard in weight_map.items():
        match = _EXPERT.search(name)
        if match:
            layer, expert = int(match["layer"]), int(match["expert"])
            kind: Literal["weight", "scale"] = "weight" if match["kind"] == "weight" else "scale"
            tensor = ExpertTensor(layer, expert, _PROJECTIONS[match["proj"]], kind, name, shard)
            experts.setdefault((layer, expert), []).append(tensor)
    return CheckpointIndex(path, weight_map, {key: tuple(tensors) for key, tensors in experts.items()}, total_size)


def read_header(shard: Path) -> dict[str, tuple[int, int]]:
    """Byte range of each tensor in a safetensors file, from the start of the file.

    Checks the file's size against the header, so truncation is found without reading data. Raises CheckpointError.
    """
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"header length {length} of a {size}-byte file")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        offsets = {name: tensor["data_offsets"] for name, tensor in header.items()}
        ranges = {name: (8 + length + begin, 8 + length + end) for name, (begin, end) in offsets.items()}
    except FileNotFoundError:
        raise CheckpointError(f"shard {shard} is missing: download it, or mend {INDEX}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"shard {shard} is not a safetensors file ({error}): download it again") from None
    expected = max((end for _, end in ranges.values()), default=8 + length)
    if size != expected:
        raise CheckpointError(f"shard {shard} has {size} bytes where its header says {expected}: download it again")
    return ranges


def check_shards(index: CheckpointIndex) -> None:
    """Every shard is there, whole, and has the tensors that the index says. Raises CheckpointError."""
    by_shard: dict[str, list[str]] = {}
    for name, shard in index.weight_map.items():
        by_shard.setdefault(shard, []).append(name)
    for shard, names in sorted(by_shard.items()):
        present = read_header(index.path / shard)
        missing = [name for name in names if name not in present]
        if missing:
            raise CheckpointError(
                f"shard {index.path / shard} lacks tensor {missing[0]} (and {len(missing) - 1} more) that {INDEX} "
                f"promises: download both again"
            )
