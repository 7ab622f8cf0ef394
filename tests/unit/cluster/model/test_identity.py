"""Which checkpoints are the same to the two ends of the expert plane."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from cluster.model.identity import model_identity, same_model
from cluster.model.spec import is_routed_expert, load_checkpoint_index, load_model_spec
from tests.checkpoint_edits import truncate_shard, without

MakeCheckpoint = Callable[..., Path]


def identity(path: Path) -> str:
    return model_identity(load_model_spec(path), load_checkpoint_index(path))


def test_it_is_the_same_however_the_weights_are_cut(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    one, three = (identity(random_checkpoint("q_lora_groups", shards=shards)) for shards in (1, 3))
    assert one == three
    copy = without(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", lambda name: False)
    assert identity(copy) == three
    assert [len(part) for part in one.split("/")] == [16, 16]


def test_either_half_is_the_same_model(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    whole = random_checkpoint("mtp", shards=3)
    attention = identity(without(whole, tmp_path / "attention", is_routed_expert))
    experts = identity(without(whole, tmp_path / "experts", lambda name: not is_routed_expert(name)))
    assert experts == identity(whole)
    assert attention == experts.split("/")[0]
    assert same_model(attention, experts)
    assert same_model(experts, attention)


def test_a_host_without_all_of_the_experts_says_nothing_of_them(
    random_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = without(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", lambda name: False)
    whole, index = identity(path), load_checkpoint_index(path)
    (path / next(iter(index.expert_tensors.values()))[0].shard).unlink()
    assert identity(path) == whole.split("/")[0]


def test_other_weights_under_the_same_config_are_another_model(
    random_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = random_checkpoint("q_lora_groups")
    ours = identity(path)
    fewer = without(path, tmp_path / "fewer", lambda name: ".mlp.experts.3." in name and "layers.2." in name)
    other_dtype = without(
        random_checkpoint("q_lora_groups", dtype="bfloat16"), tmp_path / "bfloat16", lambda name: False
    )
    (other_dtype / "config.json").write_bytes((path / "config.json").read_bytes())
    for theirs in map(identity, (fewer, other_dtype)):
        assert theirs.split("/")[0] == ours.split("/")[0]
        assert not same_model(ours, theirs)


def test_another_config_is_another_model(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = without(random_checkpoint("q_lora_groups"), tmp_path / "copy", lambda name: False)
    ours, config = identity(path), json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"routed_scaling_factor": 1.25}))
    assert not same_model(ours, identity(path))
    assert not same_model(identity(path), ours.split("/")[0])


def test_a_broken_shard_is_named(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = truncate_shard(random_checkpoint("q_lora_groups"), tmp_path / "cut")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        identity(path)
