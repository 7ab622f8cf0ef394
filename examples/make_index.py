"""Writes model.safetensors.index.json of a DeepSeek-V3 or V3.2 checkpoint from its config.json: every tensor's name.

    python examples/make_index.py examples/deepseek-v3 > examples/deepseek-v3/model.safetensors.index.json

Names, shapes and dtypes are those of the published checkpoints (FP8 E4M3 linears with one float32 `weight_scale_inv`
per 128x128 block; embeddings, norms, router, LM head, the MTP projection and the weights of the indexer's heads in
bfloat16). Which shard holds which tensor is generated: 163 shards of about equal size, filled in layer order.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

SHARDS = 163
BLOCK = 128
_BF16 = 2
_F32 = 4


def tensors(config: dict[str, int]) -> Iterator[tuple[str, int]]:
    """Name and size in bytes of every tensor, in the order of the layers."""
    hidden, vocab, layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    yield "model.embed_tokens.weight", vocab * hidden * _BF16
    for layer in range(layers + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        if layer >= layers:  # the Multi-Token Prediction module
            yield f"{prefix}.embed_tokens.weight", vocab * hidden * _BF16
            yield f"{prefix}.enorm.weight", hidden * _BF16
            yield f"{prefix}.hnorm.weight", hidden * _BF16
            yield f"{prefix}.eh_proj.weight", hidden * 2 * hidden * _BF16
        yield f"{prefix}.input_layernorm.weight", hidden * _BF16
        yield from _attention(f"{prefix}.self_attn", config)
        yield f"{prefix}.post_attention_layernorm.weight", hidden * _BF16
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            yield from _moe(f"{prefix}.mlp", config)
        if layer >= layers:
            yield f"{prefix}.shared_head.norm.weight", hidden * _BF16
            yield f"{prefix}.shared_head.head.weight", vocab * hidden * _BF16
    yield "model.norm.weight", hidden * _BF16
    yield "lm_head.weight", vocab * hidden * _BF16


def _attention(prefix: str, config: dict[str, int]) -> Iterator[tuple[str, int]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    yield from _fp8(f"{prefix}.q_a_proj", q_rank, hidden)
    yield f"{prefix}.q_a_layernorm.weight", q_rank * _BF16
    yield from _fp8(f"{prefix}.q_b_proj", heads * (nope + rope), q_rank)
    yield from _fp8(f"{prefix}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield f"{prefix}.kv_a_layernorm.weight", kv_rank * _BF16
    yield from _fp8(f"{prefix}.kv_b_proj", heads * (nope + value), kv_rank)
    yield from _fp8(f"{prefix}.o_proj", hidden, heads * value)
    if "index_topk" in config:
        index_heads, width = config["index_n_heads"], config["index_head_dim"]
        yield from _fp8(f"{prefix}.indexer.wq_b", index_heads * width, q_rank)
        yield from _fp8(f"{prefix}.indexer.wk", width, hidden)
        yield f"{prefix}.indexer.k_norm.weight", width * _F32
        yield f"{prefix}.indexer.k_norm.bias", width * _F32
        yield f"{prefix}.indexer.weights_proj.weight", index_heads * hidden * _BF16


def _moe(prefix: str, config: dict[str, int]) -> Iterator[tuple[str, int]]:
    hidden, inner, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    yield f"{prefix}.gate.weight", experts * hidden * _BF16
    yield f"{prefix}.gate.e_score_correction_bias", experts * _F32
    yield from _mlp(f"{prefix}.shared_experts", hidden, inner * config["n_shared_experts"])
    for expert in range(experts):
        yield from _mlp(f"{prefix}.experts.{expert}", hidden, inner)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[tuple[str, int]]:
    yield from _fp8(f"{prefix}.gate_proj", inner, hidden)
    yield from _fp8(f"{prefix}.up_proj", inner, hidden)
    yield from _fp8(f"{prefix}.down_proj", hidden, inner)


def _fp8(prefix: str, rows: int, columns: int) -> Iterator[tuple[str, int]]:
    yield f"{prefix}.weight", rows * columns
    yield f"{prefix}.weight_scale_inv", math.ceil(rows / BLOCK) * math.ceil(columns / BLOCK) * _F32


def index(config: dict[str, int]) -> str:
    """The index file's text."""
    sizes = dict(tensors(config))
    total = sum(sizes.values())
    weight_map, before = {}, 0
    for name, size in sizes.items():
        shard = before * SHARDS // total + 1
        weight_map[name] = f"model-{shard:05d}-of-{SHARDS:06d}.safetensors"
        before += size
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=0) + "\n"


if __name__ == "__main__":
    print(index(json.loads((Path(sys.argv[1]) / "config.json").read_text())), end="")
