"""The tensor index and shard headers: right names, clear refusals, fast at DeepSeek-V3's size."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from cluster.errors import CheckpointError
from cluster.model.checkpoint import check_shards, is_routed_expert, load_checkpoint_index, read_entries
from tests.checkpoint_edits import INDEX, drop_tensor, shard_files, truncate_shard

MakeCheckpoint = Callable[..., Path]
V3 = Path(__file__).resolve().parents[4] / "examples" / "deepseek-v3"


@pytest.mark.parametrize(
    ("name", "routed"),
    [
        ("model.layers.3.mlp.experts.17.gate_proj.weight", True),
        ("model.layers.61.mlp.experts.255.down_proj.weight_scale_inv", True),
        ("model.language_model.layers.3.mlp.experts.0.up_proj.weight", True),
        ("language_model.model.layers.3.mlp.experts.0.up_proj.weight", True),
        ("model.layers.0.block_sparse_moe.experts.7.w2.weight", True),
        ("model.layers.0.mlp.experts.gate_up_proj", True),
        ("mtp.layers.0.mlp.experts.3.up_proj.weight", True),
        ("model.layers.3.mlp.shared_experts.gate_proj.weight", False),
        ("model.layers.3.mlp.shared_expert.gate_proj.weight", False),
        ("model.layers.3.mlp.gate.weight", False),
        ("model.layers.3.mlp.gate.e_score_correction_bias", False),
        ("model.layers.0.mlp.gate_proj.weight", False),
        ("model.layers.0.block_sparse_moe.gate.weight", False),
    ],
)
def test_tells_routed_experts_by_name(name: str, routed: bool) -> None:
    assert is_routed_expert(name) is routed


def test_reads_deepseek_v3s_index_in_two_seconds_without_a_shard() -> None:
    started = time.process_time()
    index = load_checkpoint_index(V3)
    assert time.process_time() - started < 2
    assert len(index.weight_map) > 91_000
    assert index.expert_layers == index.router_layers == set(range(3, 62))
    assert len(index.expert_tensors) == 59 * 256
    assert {(t.proj, t.kind) for t in index.expert_tensors[61, 255]} == {
        (proj, kind) for proj in ("gate", "up", "down") for kind in ("weight", "scale")
    }
    assert not any((V3 / shard).exists() for shard in set(index.weight_map.values()))


def test_single_file_and_sharded_checkpoints_have_the_same_index(random_checkpoint: MakeCheckpoint) -> None:
    single = load_checkpoint_index(random_checkpoint("q_lora_groups"))
    sharded = load_checkpoint_index(random_checkpoint("q_lora_groups", shards=3))
    assert single.weight_map.keys() == sharded.weight_map.keys()
    assert single.expert_tensors.keys() == sharded.expert_tensors.keys()
    assert single.expert_layers == sharded.expert_layers == {1, 2}
    assert set(single.weight_map.values()) == {"model.safetensors"}
    assert len(set(sharded.weight_map.values())) == 3


def test_mixtral_names(tmp_path: Path) -> None:
    at = "model.layers.0.block_sparse_moe"
    names = [f"{at}.gate.weight", *(f"{at}.experts.0.{w}.weight" for w in ("w1", "w2", "w3"))]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    index = load_checkpoint_index(tmp_path)
    assert [(t.proj, t.kind) for t in index.expert_tensors[0, 0]] == [
        ("gate", "weight"), ("down", "weight"), ("up", "weight"),
    ]  # fmt: skip
    assert index.router_layers == {0}


def test_entries_are_those_of_the_safetensors_library(random_checkpoint: MakeCheckpoint) -> None:
    shard = random_checkpoint("fp8", dtype="bfloat16") / "model.safetensors"
    entries, raw = read_entries(shard), shard.read_bytes()
    with safe_open(shard, framework="pt") as file:
        assert set(file.keys()) == set(entries)
        for name in file.keys():  # noqa: SIM118  # not a dict
            tensor, entry = file.get_tensor(name), entries[name]
            assert tuple(tensor.shape) == entry.shape
            stored = tensor.contiguous().reshape(-1).view(dtype=__import__("torch").uint8).numpy().tobytes()
            assert stored == raw[entry.begin : entry.end]


def refuses(message: str) -> object:
    return pytest.raises(CheckpointError, match=message)


def test_no_index_at_all(tmp_path: Path) -> None:
    with refuses(r"has neither model.safetensors.index.json nor model.safetensors: download .* in safetensors format"):
        load_checkpoint_index(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_bad_index(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_text(content)
    with refuses("index.json is not a safetensors index .*: download this file again"):
        load_checkpoint_index(tmp_path)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("model.layers.1.mlp.experts.gate_up_proj", " (all experts in one tensor)"),
        ("model.layers.1.mlp.experts.gate_up_proj_blocks", " (MXFP4, all experts in one tensor)"),  # gpt-oss
        ("model.layers.1.mlp.experts.0.gate_proj.weight_packed", " (INT4, packed)"),  # Kimi-K2-Thinking
        ("model.layers.1.mlp.experts.0.gate_proj.bias", ""),
    ],
)
def test_experts_in_a_layout_that_cannot_be_split(tmp_path: Path, name: str, known: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: "a.safetensors"}}))
    with refuses(f"cannot read routed-expert tensor {re.escape(name + known)}: .*; use a checkpoint in that format"):
        load_checkpoint_index(tmp_path)


@pytest.mark.parametrize("name", [
    "layers.3.ffn.experts.7.w1.weight",  # DeepSeek's own names
    "language_model.model.layers.1.feed_forward.experts.gate_up_proj",  # Llama-4
    "transformer.blocks.0.ffn.experts.mlp.w1",  # DBRX
])  # fmt: skip
def test_experts_whose_names_are_not_known_are_not_left_to_attention(tmp_path: Path, name: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: "a.safetensors"}}))
    with refuses(f"tensor {re.escape(name)} seems to be a routed expert's, .*; serve this model with plain vLLM"):
        load_checkpoint_index(tmp_path)


def test_shared_experts_are_attentions(tmp_path: Path) -> None:
    names = ["model.layers.1.mlp.shared_experts.up_proj.weight", "model.layers.1.mlp.shared_expert_gate.weight"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))
    assert load_checkpoint_index(tmp_path).expert_layers == frozenset()


def test_whole_shards_pass(random_checkpoint: MakeCheckpoint) -> None:
    index = load_checkpoint_index(random_checkpoint("q_lora_groups", shards=3))
    check_shards(index)


def test_a_missing_shard(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    broken = truncate_shard(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", keep=1)
    gone = shard_files(broken)[1]
    gone.unlink()
    index = load_checkpoint_index(broken)
    with refuses(f"shard {gone} is missing: download this shard again"):
        check_shards(index)


def test_a_truncated_shard_names_both_sizes(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    whole = random_checkpoint("q_lora_groups", shards=3)
    broken = truncate_shard(whole, tmp_path / "copy", shard=2, keep=0.75)
    file = shard_files(broken)[2]
    have, want = file.stat().st_size, shard_files(whole)[2].stat().st_size
    with refuses(f"shard {file} is truncated: {have} bytes, but its header says {want}: download this shard again"):
        check_shards(load_checkpoint_index(broken))


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_a_shard_that_ends_in_its_header(random_checkpoint: MakeCheckpoint, tmp_path: Path, size: int) -> None:
    broken = truncate_shard(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", keep=1)
    os.truncate(shard_files(broken)[0], size)
    with refuses(f"is truncated: {size} bytes end inside its header: download this shard again"):
        check_shards(load_checkpoint_index(broken))


def test_a_tensor_that_the_index_promises_in_vain(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    broken = drop_tensor(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", name)
    with refuses(f"tensor {re.escape(name)} is missing from shard .*, where the index has it: download"):
        check_shards(load_checkpoint_index(broken))


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}',
    ],
)
def test_a_bad_header(tmp_path: Path, header: bytes) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with refuses(f"shard {shard} has a bad safetensors header .*: download this shard again"):
        load_checkpoint_index(tmp_path)


def test_a_header_length_out_of_bounds(tmp_path: Path) -> None:
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"\xff" * 64)
    with refuses(f"shard {shard} has a bad safetensors header"):
        read_entries(shard)
