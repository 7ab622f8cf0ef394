"""A checkpoint's tensor index and shard headers: what is where, without reading a weight.

Routed experts are found by tensor name, as DeepSeek V2/V3/R1, Kimi-K2, GLM4-MoE, Qwen2/3-MoE (`mlp.experts`) and
Mixtral (`block_sparse_moe.experts`) publish them. An index of DeepSeek-V3's size (91,000 tensors) loads in a second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cluster.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER_BYTES = 100 * 2**20  # the bound of the safetensors library itself
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "U8": 1}

Proj = Literal["gate", "up", "down"]
Kind = Literal["weight", "scale"]

_PROJ: dict[str, Proj] = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "w1": "gate", "w3": "up", "w2": "down",  # Mixtral's names
}  # fmt: skip
_KIND: dict[str, Kind] = {"weight": "weight", "weight_scale_inv": "scale"}
_ROUTED = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(.+)$")
_EXPERT = re.compile(r"(\d+)\.([a-z0-9_]+)\.(weight|weight_scale_inv)$")
_OTHER_FORMATS = {  # by the end of a tensor's name
    ".weight_packed": " (INT4, packed)", "_blocks": " (MXFP4, all experts in one tensor)",
    "_scales": " (MXFP4, all experts in one tensor)", "_proj": " (all experts in one tensor)",
}  # fmt: skip
_EXPERTS_ELSEWHERE = re.compile(r"(?:^|\.)experts?\.")  # a part of a name, and not of the shared experts' names
_ROUTER = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")


class ExpertTensor(NamedTuple):
    """One tensor of one routed expert; `shard` is a file name in the checkpoint's folder."""

    layer: int
    expert: int
    proj: Proj
    kind: Kind
    name: str
    shard: str


class TensorEntry(NamedTuple):
    """Where a tensor lies: bytes [begin, end) of its file."""

    dtype: str  # safetensors' name, such as "BF16"
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class CheckpointIndex:
    """Names of all tensors of a checkpoint, and the routed experts' among them."""

    path: Path
    weight_map: Mapping[str, str]  # tensor name -> shard file name
    expert_tensors: Mapping[tuple[int, int], tuple[ExpertTensor, ...]] = field(repr=False)  # by (layer, expert)
    expert_layers: frozenset[int]  # layers with at least one routed expert
    router_layers: frozenset[int]  # layers with a router
    total_size: int | None  # bytes of all tensors, where the index says so


def is_routed_expert(name: str) -> bool:
    """Whether a tensor belongs to a routed expert (shared experts and routers do not)."""
    return _ROUTED.search(name) is not None


def has_index(path: Path) -> bool:
    """Whether `path` tells its tensors' names: by an index file or by being a single safetensors file."""
    return (path / INDEX_NAME).exists() or (path / SINGLE_NAME).exists()


def check_folder(path: Path) -> None:
    """Raises CheckpointError, naming the most similar folder beside it, if `path` is no folder."""
    if path.is_dir():
        return
    import difflib

    siblings = [s.name for s in path.parent.iterdir() if s.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.0)
    hint = f"did you mean {path.parent / near[0]}?" if near else "set model.path to the folder that holds config.json"
    raise CheckpointError(f"model path {path} {'is not a folder' if path.exists() else 'does not exist'}: {hint}")


def load_checkpoint_index(path: Path | str) -> CheckpointIndex:
    """The index of the checkpoint in `path`; opens no shard unless the checkpoint is a single file.

    Raises CheckpointError if there is none, or if its routed experts are stored in a way that cannot be split.
    """
    path = Path(path)
    check_folder(path)
    if (path / INDEX_NAME).exists():
        try:
            data = json.loads((path / INDEX_NAME).read_text())
            weight_map = dict(data["weight_map"])
            total_size = (data.get("metadata") or {}).get("total_size")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path / INDEX_NAME} is not a safetensors index ({error!r}): download this file again"
            ) from None
    elif (path / SINGLE_NAME).exists():
        weight_map, total_size = dict.fromkeys(read_entries(path / SINGLE_NAME), SINGLE_NAME), None
    else:
        raise CheckpointError(
            f"{path} has neither {INDEX_NAME} nor {SINGLE_NAME}: download the checkpoint in safetensors format"
        )
    return _index(path, weight_map, total_size)


def _index(path: Path, weight_map: Mapping[str, str], total_size: int | None) -> CheckpointIndex:
    experts: dict[tuple[int, int], list[ExpertTensor]] = {}
    routers: set[int] = set()
    for name, shard in weight_map.items():
        if name.startswith("mtp."):
            continue  # numbered from 0 again (Qwen3-Next): not layers of the decoder
        if routed := _ROUTED.search(name):
            parts = _EXPERT.match(routed[2])
            if parts is None or parts[2] not in _PROJ:
                known = next((what for end, what in _OTHER_FORMATS.items() if name.endswith(end)), "")
                raise CheckpointError(
                    f"{path}: cannot read routed-expert tensor {name}{known}: experts must be one tensor per expert "
                    f"and projection, plain or FP8 with weight_scale_inv; use a checkpoint in that format"
                )
            layer, expert = int(routed[1]), int(parts[1])
            tensor = ExpertTensor(layer, expert, _PROJ[parts[2]], _KIND[parts[3]], name, shard)
            experts.setdefault((layer, expert), []).append(tensor)
        elif router := _ROUTER.search(name):
            routers.add(int(router[1]))
        elif _EXPERTS_ELSEWHERE.search(name):  # left alone, it would be loaded by the attention half
            raise CheckpointError(
                f"{path}: tensor {name} seems to be a routed expert's, but those of this model are not known: they "
                f"must be called layers.N.mlp.experts.E or layers.N.block_sparse_moe.experts.E; serve this model with "
                f"plain vLLM"
            )
    return CheckpointIndex(
        path,
        weight_map,
        {key: tuple(tensors) for key, tensors in experts.items()},
        frozenset(layer for layer, _ in experts),
        frozenset(routers),
        total_size,
    )


def read_entries(shard: Path) -> dict[str, TensorEntry]:
    """Entries of a safetensors file by tensor name, with byte ranges from the file's start.

    Format: 8 bytes little-endian header length, JSON header, data. Raises CheckpointError if the file is missing, its
    header is not valid, or its size is not what the header says.
    """
    again = "download this shard again"
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"shard {shard} {problem}: {again}") from None
    if size < 8 or (length <= _MAX_HEADER_BYTES and len(raw) < length):
        raise CheckpointError(f"shard {shard} is truncated: {size} bytes end inside its header: {again}")
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(item, 8 + length) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"shard {shard} has a bad safetensors header ({error!r}): {again}") from None
    expected = max((entry.end for entry in entries.values()), default=8 + length)
    if size != expected:
        problem = "is truncated" if size < expected else "is too long"
        raise CheckpointError(f"shard {shard} {problem}: {size} bytes, but its header says {expected}: {again}")
    return entries


def _entry(item: dict[str, Any], data_start: int) -> TensorEntry:
    dtype, shape, (begin, end) = str(item["dtype"]), tuple(item["shape"]), item["data_offsets"]
    entry = TensorEntry(dtype, shape, data_start + begin, data_start + end)
    if entry.end < entry.begin:
        raise ValueError(f"data_offsets {begin}, {end}")
    if entry.dtype in _ITEM_BYTES and prod(entry.shape) * _ITEM_BYTES[entry.dtype] != entry.end - entry.begin:
        raise ValueError(f"shape {entry.shape} of {dtype} in {entry.end - entry.begin} bytes")
    return entry


def check_shards(index: CheckpointIndex) -> None:
    """Every shard exists, is as long as its header says, and has the tensors that the index promises.

    Reads headers only. Raises CheckpointError naming the file and the fix.
    """
    promised: dict[str, list[str]] = {}
    for name, shard in index.weight_map.items():
        promised.setdefault(shard, []).append(name)
    for shard in sorted(promised):
        entries = read_entries(index.path / shard)
        missing = [name for name in promised[shard] if name not in entries]
        if missing:
            raise CheckpointError(
                f"tensor {missing[0]} is missing from shard {index.path / shard}, where the index has it"
                f"{f' ({len(missing)} such tensors)' if len(missing) > 1 else ''}: download this shard again"
            )
