"""What tells one checkpoint from another, without reading a weight."""

from __future__ import annotations

from hashlib import sha256

from cluster.model.checkpoint import CheckpointIndex, read_entries
from cluster.model.spec import ModelSpec

_DIGITS = 16
_BETWEEN = "/"


def model_identity(spec: ModelSpec, index: CheckpointIndex) -> str:
    """Return what must fit on both ends of a stream of the expert plane (see `same_model`): a hash over config.json and
    the MoE layers, and one over each routed-expert tensor's name, dtype, shape and size, 16 hex digits each.

    It is the same wherever the checkpoint lies and however it is cut into shards. The second hash is left out where not
    all of the routed experts are on this host, which an attention replica does not need. Reads headers only (half a
    second for DeepSeek-V3's 163 shards), so checkpoints that differ in the weights' values alone, as fine-tunes of one
    model do, have the same identity. Raises CheckpointError as `read_entries` does.
    """
    config = sha256((index.path / "config.json").read_bytes() + repr(spec.moe_layers).encode()).hexdigest()[:_DIGITS]
    experts = _experts(index)
    return config if experts is None else f"{config}{_BETWEEN}{experts}"


def same_model(ours: str, theirs: str) -> bool:
    """Whether two identities do not contradict each other."""
    return all(mine == other for mine, other in zip(ours.split(_BETWEEN), theirs.split(_BETWEEN), strict=False))


def _experts(index: CheckpointIndex) -> str | None:
    shard_of = {tensor.name: tensor.shard for tensors in index.expert_tensors.values() for tensor in tensors}
    shards = sorted(set(shard_of.values()))
    if not shards or not all((index.path / shard).exists() for shard in shards):
        return None
    entries = {shard: read_entries(index.path / shard) for shard in shards}
    digest = sha256()
    for name in sorted(shard_of):
        entry = entries[shard_of[name]].get(name)
        # A tensor that its shard lacks is for those to report who load it.
        what = None if entry is None else (entry.dtype, entry.shape, entry.end - entry.begin)
        digest.update(repr((name, what)).encode())
    return digest.hexdigest()[:_DIGITS]
