"""A checkpoint of a few kilobytes with the names and files of a real one, for tests that read no weight."""

from __future__ import annotations

import json
import struct
from pathlib import Path

HIDDEN = 8
INNER = 4
EXPERTS = 4
LAYERS = 2  # the first dense, the second with experts


def write_tiny_checkpoint(folder: Path) -> Path:
    """config.json and model.safetensors of a DeepSeek-V3-shaped model, all zeros."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "float32",
        "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "intermediate_size": 16, "n_routed_experts": EXPERTS,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "num_hidden_layers": LAYERS, "first_k_dense_replace": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": None, "kv_lora_rank": 6,
        "qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 2, "vocab_size": 32,
        "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (32, HIDDEN), "model.layers.1.mlp.gate.weight": (EXPERTS, HIDDEN)}
    for expert in range(EXPERTS):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        shapes |= {f"{prefix}.gate_proj.weight": (INNER, HIDDEN), f"{prefix}.up_proj.weight": (INNER, HIDDEN)}
        shapes |= {f"{prefix}.down_proj.weight": (HIDDEN, INNER)}
    header, end = {}, 0
    for name, (rows, columns) in shapes.items():
        begin, end = end, end + rows * columns * 4
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    return folder
