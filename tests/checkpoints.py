"""Random, seeded checkpoints in Hugging Face's on-disk format, one per model shape that deepsplit must serve.

Weights are scaled so that every part matters to the output: activations stay near unit size, routed experts add about
as much to the residual stream as attention does, and the router spreads tokens over all experts. Norm weights and the
router's correction bias are random too, so that code which forgets one of them gives other tokens.

Changed copies (tensors removed, shards truncated, dequantised) come from `tests.checkpoint_edits`.

Legend of shape suffixes: H hidden, I intermediate, E experts, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from safetensors.torch import save_file

from tests.tiny_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE, write_tokenizer

FP8_BLOCK = 128  # DeepSeek-V3: one float32 scale per 128 x 128 block
_FP8_MAX = 448.0  # largest finite float8_e4m3fn
_KV_LORA_RANK, _ROPE_DIM = 512, 64  # the only sizes that vLLM's CPU MLA backend serves

Architecture = Literal["DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "Qwen3MoeForCausalLM"]


@dataclass(frozen=True)
class Shape:
    """What distinguishes one checkpoint from another. A DeepSeek shape begins with `dense_layers` without experts."""

    architecture: Architecture = "DeepseekV3ForCausalLM"
    hidden_size: int = 128
    moe_intermediate_size: int = 64
    num_layers: int = 3
    dense_layers: int = 1
    heads: int = 4
    head_dim: int = 32  # of values, and of queries and keys without their rotary part
    num_experts: int = 16
    top_k: int = 4
    q_lora_rank: int | None = 64
    n_group: int = 4
    topk_group: int = 2
    num_shared_experts: int = 1
    num_mtp_layers: int = 0
    yarn: bool = False  # RoPE with YaRN scaling, as DeepSeek-V3 has it; plain RoPE otherwise
    max_positions: int = 512
    fp8_experts: bool = False  # routed experts as float8_e4m3fn with one float32 scale per block
    fp8_linears: bool = False  # all other linear layers too, as DeepSeek-V3 is released
    ue8m0: bool = False  # scales that are powers of two, as since DeepSeek-V3.1
    index_topk: int = 16  # DeepSeek-V3.2: positions that a token attends to
    index_heads: int = 16  # with few, many scores tie at 0
    index_head_dim: int = 128

    @property
    def deepseek(self) -> bool:
        """Whether it is a model of that line."""
        return self.architecture != "Qwen3MoeForCausalLM"

    @property
    def sparse(self) -> bool:
        """Whether its attention is."""
        return self.architecture == "DeepseekV32ForCausalLM"

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers with routed experts, MTP layers included."""
        first = self.dense_layers if self.deepseek else 0
        return tuple(range(first, self.num_layers + self.num_mtp_layers))


SHAPES: MappingProxyType[str, Shape] = MappingProxyType(
    {
        "q_lora_groups": Shape(),
        "no_q_lora": Shape(q_lora_rank=None),
        "one_group": Shape(n_group=1, topk_group=1),
        "two_shared": Shape(num_shared_experts=2, yarn=True),
        "sixty_experts": Shape(num_experts=60, top_k=6),  # 60 experts over 7 workers: not divisible
        "mtp": Shape(num_mtp_layers=1),
        "fp8": Shape(hidden_size=256, moe_intermediate_size=128, fp8_experts=True),
        "released_fp8": Shape(
            hidden_size=256, moe_intermediate_size=128, head_dim=64, q_lora_rank=128, num_mtp_layers=1,
            fp8_experts=True, fp8_linears=True,
        ),
        "v32": Shape(architecture="DeepseekV32ForCausalLM"),
        "v32_yarn": Shape(architecture="DeepseekV32ForCausalLM", num_mtp_layers=1, yarn=True),
        "v32_released_fp8": Shape(
            architecture="DeepseekV32ForCausalLM", hidden_size=256, moe_intermediate_size=128, head_dim=64,
            q_lora_rank=128, num_mtp_layers=1, fp8_experts=True, fp8_linears=True, ue8m0=True,
        ),
        "qwen3_moe": Shape(architecture="Qwen3MoeForCausalLM", n_group=1, topk_group=1, num_shared_experts=0),
    }
)


def make_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    seed: int = 0,
    shards: int = 1,
) -> Path:
    """Write a whole checkpoint into `folder` (made if missing) and return `folder`.

    The same arguments give the same bytes. With one shard it is `model.safetensors` and no index; with more,
    `model-0000i-of-0000n.safetensors` and `model.safetensors.index.json`, tensors dealt to the shards in turn, so that
    one expert's tensors lie in different shards.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(_Maker(shape, getattr(torch, dtype), seed).tensors())
    write_shards(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=2) + "\n")
    write_tokenizer(folder)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write `tensors` as `shards` safetensors files, with an index if there is more than one."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for index in range(shards):
        file = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[index::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def quantise_fp8(weight: torch.Tensor, ue8m0: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-quantise a float [rows, cols] to float8_e4m3fn and float32 scales [rows/128, cols/128], rounded up.

    The weight is `fp8 * scale`, block by block, as DeepSeek-V3's `weight_scale_inv` says. `ue8m0`: scales are powers of
    two, as since V3.1.
    """
    rows, cols = (-(-size // FP8_BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * FP8_BLOCK, cols * FP8_BLOCK)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, FP8_BLOCK, cols, FP8_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)) / _FP8_MAX
    scale = scale.log2().ceil().exp2() if ue8m0 else scale
    fp8 = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return fp8.view(padded.shape)[: weight.shape[0], : weight.shape[1]].contiguous(), scale


class _Maker:
    """Draws every tensor of one checkpoint from one random stream."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int) -> None:
        self.shape, self.dtype = shape, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.hidden = shape.hidden_size

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        embed = self._normal(VOCAB_SIZE, self.hidden, std=0.5)
        # Logits with a standard deviation of 4: wide margins between the first and the second token.
        head = self._normal(VOCAB_SIZE, self.hidden, std=4 / self.hidden**0.5)
        yield "model.embed_tokens.weight", embed
        for layer in range(self.shape.num_layers):
            yield from self._layer(layer)
        yield "model.norm.weight", self._norm(self.hidden)
        yield "lm_head.weight", head
        for layer in range(self.shape.num_layers, self.shape.num_layers + self.shape.num_mtp_layers):
            at = f"model.layers.{layer}"
            yield f"{at}.embed_tokens.weight", embed.clone()
            yield f"{at}.enorm.weight", self._norm(self.hidden)
            yield f"{at}.hnorm.weight", self._norm(self.hidden)
            yield f"{at}.eh_proj.weight", self._linear(self.hidden, 2 * self.hidden)
            yield from self._layer(layer)
            yield f"{at}.shared_head.norm.weight", self._norm(self.hidden)
            yield f"{at}.shared_head.head.weight", head.clone()

    def _layer(self, layer: int) -> Iterator[tuple[str, torch.Tensor]]:
        at = f"model.layers.{layer}"
        deepseek = self.shape.deepseek
        yield f"{at}.input_layernorm.weight", self._norm(self.hidden)
        yield f"{at}.post_attention_layernorm.weight", self._norm(self.hidden)
        yield from self._mla(f"{at}.self_attn") if deepseek else self._gqa(f"{at}.self_attn")
        if layer not in self.shape.moe_layers:
            for name, weight in self._mlp(f"{at}.mlp", 2 * self.hidden):
                yield from self._stored(name, weight, self.shape.fp8_linears)
            return
        yield f"{at}.mlp.gate.weight", self._linear(self.shape.num_experts, self.hidden, gain=1.5)
        if deepseek:
            bias = self._normal(self.shape.num_experts, std=0.1)
            yield f"{at}.mlp.gate.e_score_correction_bias", bias.float()
        if self.shape.num_shared_experts:
            shared = self.shape.num_shared_experts * self.shape.moe_intermediate_size
            for name, weight in self._mlp(f"{at}.mlp.shared_experts", shared):
                yield from self._stored(name, weight, self.shape.fp8_linears)
        for expert in range(self.shape.num_experts):
            for name, weight in self._mlp(f"{at}.mlp.experts.{expert}", self.shape.moe_intermediate_size):
                yield from self._stored(name, weight, self.shape.fp8_experts)

    def _mla(self, at: str) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self._plain_mla(at):
            yield from self._stored(name, weight, self.shape.fp8_linears and weight.dim() == 2)
        if self.shape.sparse:
            for name, weight in self._indexer(f"{at}.indexer"):
                in_blocks = name.endswith((".wq_b.weight", ".wk.weight"))
                yield from self._stored(name, weight, self.shape.fp8_linears and in_blocks)

    def _indexer(self, at: str) -> Iterator[tuple[str, torch.Tensor]]:
        heads, width = self.shape.index_heads, self.shape.index_head_dim
        assert self.shape.q_lora_rank
        yield f"{at}.wq_b.weight", self._linear(heads * width, self.shape.q_lora_rank)
        yield f"{at}.wk.weight", self._linear(width, self.hidden)
        yield f"{at}.k_norm.weight", self._norm(width).float()
        yield f"{at}.k_norm.bias", self._normal(width, std=0.1).float()
        yield f"{at}.weights_proj.weight", self._linear(heads, self.hidden)

    def _plain_mla(self, at: str) -> Iterator[tuple[str, torch.Tensor]]:
        query_rows = self.shape.heads * (self.shape.head_dim + _ROPE_DIM)
        if rank := self.shape.q_lora_rank:
            yield f"{at}.q_a_proj.weight", self._linear(rank, self.hidden)
            yield f"{at}.q_a_layernorm.weight", self._norm(rank)
            yield f"{at}.q_b_proj.weight", self._linear(query_rows, rank, gain=2)
        else:
            yield f"{at}.q_proj.weight", self._linear(query_rows, self.hidden, gain=2)
        yield f"{at}.kv_a_proj_with_mqa.weight", self._linear(_KV_LORA_RANK + _ROPE_DIM, self.hidden)
        yield f"{at}.kv_a_layernorm.weight", self._norm(_KV_LORA_RANK)
        yield f"{at}.kv_b_proj.weight", self._linear(self.shape.heads * 2 * self.shape.head_dim, _KV_LORA_RANK)
        yield f"{at}.o_proj.weight", self._linear(self.hidden, self.shape.heads * self.shape.head_dim)

    def _gqa(self, at: str) -> Iterator[tuple[str, torch.Tensor]]:
        for proj, heads in (("q", self.shape.heads), ("k", self.shape.heads // 2), ("v", self.shape.heads // 2)):
            yield f"{at}.{proj}_proj.weight", self._linear(heads * self.shape.head_dim, self.hidden)
        for proj in ("q", "k"):
            yield f"{at}.{proj}_norm.weight", self._norm(self.shape.head_dim) * 1.5
        yield f"{at}.o_proj.weight", self._linear(self.hidden, self.shape.heads * self.shape.head_dim)

    def _mlp(self, at: str, intermediate: int) -> Iterator[tuple[str, torch.Tensor]]:
        yield f"{at}.gate_proj.weight", self._linear(intermediate, self.hidden)
        yield f"{at}.up_proj.weight", self._linear(intermediate, self.hidden)
        # silu(gate) * up of unit inputs has a root mean square near 0.5: bring it back to 1.
        yield f"{at}.down_proj.weight", self._linear(self.hidden, intermediate, gain=2)

    def _stored(self, name: str, weight: torch.Tensor, fp8: bool) -> Iterator[tuple[str, torch.Tensor]]:
        if not fp8:
            yield name, weight
            return
        quantised, scale = quantise_fp8(weight, self.shape.ue8m0)
        yield name, quantised
        yield f"{name}_scale_inv", scale

    def _linear(self, rows: int, cols: int, gain: float = 1.0) -> torch.Tensor:
        return self._normal(rows, cols, std=gain / cols**0.5)

    def _norm(self, size: int) -> torch.Tensor:
        return 1 + self._normal(size, std=0.1)

    def _normal(self, *size: int, std: float) -> torch.Tensor:
        return (torch.randn(*size, generator=self.generator) * std).to(self.dtype)


def _config(shape: Shape, dtype: str) -> dict[str, object]:
    """config.json, as the model's authors publish it (the names of before transformers 5)."""
    config: dict[str, object] = {
        "architectures": [shape.architecture],
        "torch_dtype": dtype,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "intermediate_size": 2 * shape.hidden_size,
        "moe_intermediate_size": shape.moe_intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.heads,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "use_cache": True,
    }
    if shape.architecture == "Qwen3MoeForCausalLM":
        return config | {
            "model_type": "qwen3_moe",
            "num_experts": shape.num_experts,
            "num_key_value_heads": shape.heads // 2,
            "head_dim": shape.head_dim,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if shape.sparse:
        config |= {
            "index_topk": shape.index_topk, "index_n_heads": shape.index_heads, "index_head_dim": shape.index_head_dim,
        }  # fmt: skip
    config |= {
        "model_type": "deepseek_v32" if shape.sparse else "deepseek_v3",
        "n_routed_experts": shape.num_experts,
        "n_shared_experts": shape.num_shared_experts,
        "num_key_value_heads": shape.heads,
        "kv_lora_rank": _KV_LORA_RANK,
        "q_lora_rank": shape.q_lora_rank,
        "qk_nope_head_dim": shape.head_dim,
        "qk_rope_head_dim": _ROPE_DIM,
        "v_head_dim": shape.head_dim,
        "n_group": shape.n_group,
        "topk_group": shape.topk_group,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": shape.dense_layers,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": shape.num_mtp_layers,
    }
    if shape.yarn:
        config["max_position_embeddings"] = 2048
        config["rope_scaling"] = {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        }
    if shape.fp8_experts:
        linear = ["q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
        plain = [f"self_attn.{name}" for name in linear]
        plain += [f"{mlp}.{proj}_proj" for mlp in ("mlp", "mlp.shared_experts") for proj in ("gate", "up", "down")]
        layers = range(shape.num_layers + shape.num_mtp_layers)
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        }
        if shape.ue8m0:
            config["quantization_config"] |= {"scale_fmt": "ue8m0"}
        if not shape.fp8_linears:
            kept = [f"model.layers.{layer}.{name}" for layer in layers for name in plain]
            config["quantization_config"] |= {"modules_to_not_convert": kept}
    return config
