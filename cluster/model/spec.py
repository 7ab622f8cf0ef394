"""What deepsplit needs to know of a model: read from config.json, checked against the tensor names. No torch.

Key names differ by family: DeepSeek V2/V3/R1, Kimi-K2 and GLM4-MoE (`n_routed_experts`, `first_k_dense_replace`,
`moe_layer_freq`), Qwen2/3-MoE (`num_experts`, `decoder_sparse_step`, `mlp_only_layers`), Mixtral (`num_local_experts`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from cluster.errors import CheckpointError
from cluster.model.checkpoint import (
    CheckpointIndex,
    ExpertTensor,
    check_folder,
    check_shards,
    has_index,
    is_routed_expert,
    load_checkpoint_index,
)

__all__ = [
    "CheckpointIndex", "ExpertQuant", "ExpertTensor", "ModelSpec", "check_experts", "check_shards", "is_routed_expert",
    "load_checkpoint_index", "load_model_spec",
]  # fmt: skip

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ExpertQuant:
    """How routed experts are stored: `fp8` is E4M3 with one float32 `weight_scale_inv` per block (rows, columns)."""

    method: str
    block_shape: tuple[int, int]


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of one MoE model. Parameter counts leave out norms and biases (below 0.01 %)."""

    path: Path
    architecture: str
    model_type: str
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int  # routed, per layer
    top_k: int
    num_shared_experts: int
    num_hidden_layers: int
    num_mtp_layers: int  # those with tensors in the checkpoint
    vocab_size: int
    max_position_embeddings: int
    moe_layers: tuple[int, ...]  # layers with routed experts; MTP layers are >= num_hidden_layers
    dtype: str  # "bfloat16", ...
    expert_quant: ExpertQuant | None
    attention_params: int  # main model but for routed experts: embeddings and head too
    mtp_attention_params: int  # the same for all MTP layers, with the embeddings and heads that they bring
    index_topk: int = 0  # positions that a token attends to with sparse attention (DeepSeek-V3.2); 0: all

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one routed expert as `dtype`: float32, bfloat16, float16, or with its scales int8 or fp8."""
        if dtype == "int8":  # packed: a float32 scale per row, and four bytes more behind each packed row
            return self.expert_params + 8 * (2 * self.moe_intermediate_size + self.hidden_size)
        if dtype != "fp8":
            return self.expert_params * DTYPE_BYTES[dtype]
        rows, columns = self.expert_quant.block_shape if self.expert_quant else (128, 128)
        hidden, inner = self.hidden_size, self.moe_intermediate_size
        blocks = 2 * ceil(inner / rows) * ceil(hidden / columns) + ceil(hidden / rows) * ceil(inner / columns)
        return self.expert_params + 4 * blocks


def load_model_spec(path: Path | str) -> ModelSpec:
    """The spec of the checkpoint in `path`, whose weights need not be there.

    With a tensor index, the names decide which MTP layers count, and must not contradict config.json. A checkpoint that
    holds one half of the model only (no routed expert, or nothing else) passes; see `check_experts` for completeness.
    Raises CheckpointError.
    """
    path = Path(path)
    raw = _Keys(path)
    experts = raw.first_int("n_routed_experts", "num_experts", "num_local_experts", default=0)
    if experts < 1:
        raise CheckpointError(
            f"{path} is not a mixture-of-experts model ({raw.architecture or raw.model_type or 'architecture unknown'} "
            f"has no n_routed_experts, num_experts or num_local_experts in config.json): nothing can be split; serve "
            f"it with plain vLLM, or set model.path to an MoE model"
        )
    _check_activation(raw)
    decoder_layers = raw.first_int("num_hidden_layers")
    moe_layers = tuple(layer for layer in range(decoder_layers) if _is_moe(raw, layer))
    mtp = raw.first_int("num_nextn_predict_layers", "num_mtp_layers", default=0)
    mtp_layers = tuple(range(decoder_layers, decoder_layers + mtp))
    if has_index(path):
        index = load_checkpoint_index(path)
        named = index.expert_layers | index.router_layers
        # The tensors decide, whatever config.json says: many copies leave MTP layers out.
        mtp_layers = tuple(sorted(layer for layer in named if layer >= decoder_layers))
        _cross_check(index, moe_layers, decoder_layers)
    inner = raw.first_int("moe_intermediate_size", "intermediate_size")
    shared_inner = raw.first_int("shared_expert_intermediate_size", default=0)  # Qwen2-MoE: one of its own size
    shared = 1 if shared_inner else raw.first_int("n_shared_experts", default=0)
    hidden, vocab = raw.first_int("hidden_size"), raw.first_int("vocab_size")
    shared_params = 3 * hidden * (shared_inner or shared * inner)
    moe_block = hidden * experts + shared_params
    dense = decoder_layers - len(moe_layers)
    dense_params = 3 * hidden * raw.first_int("intermediate_size", default=inner) if dense else 0
    embeddings = 1 if raw.tied else 2
    return ModelSpec(
        path=path, architecture=raw.architecture, model_type=raw.model_type, hidden_size=hidden,
        moe_intermediate_size=inner, num_experts=experts,
        top_k=raw.first_int("num_experts_per_tok", "num_experts_per_token", "moe_topk"), num_shared_experts=shared,
        num_hidden_layers=decoder_layers, num_mtp_layers=len(mtp_layers), vocab_size=vocab,
        max_position_embeddings=raw.first_int("max_position_embeddings"), moe_layers=moe_layers + mtp_layers,
        dtype=raw.dtype, expert_quant=_expert_quant(raw),
        attention_params=decoder_layers * _attention_params(raw, hidden) + len(moe_layers) * moe_block
        + dense * dense_params + embeddings * vocab * hidden,
        index_topk=raw.first_int("index_topk", default=0),
        # An MTP layer brings eh_proj (2H x H), an embedding and a head.
        mtp_attention_params=len(mtp_layers)
        * (_attention_params(raw, hidden) + moe_block + 2 * hidden * hidden + 2 * vocab * hidden),
    )  # fmt: skip


def check_experts(index: CheckpointIndex, spec: ModelSpec) -> None:
    """Every routed expert of every MoE layer has its tensors in the index. Raises CheckpointError, naming the gap."""
    wanted = {"gate", "up", "down"}
    for layer in spec.moe_layers:
        if layer not in index.expert_layers:
            raise CheckpointError(_layer_absent(index, layer))
        for expert in range(spec.num_experts):
            tensors = index.expert_tensors.get((layer, expert), ())
            missing = sorted(wanted - {tensor.proj for tensor in tensors if tensor.kind == "weight"})
            if missing:
                raise CheckpointError(
                    f"{index.path}: layer {layer}, expert {expert} has no {missing[0]} projection in the index: "
                    f"download the checkpoint again"
                )


def _check_activation(raw: _Keys) -> None:
    activation = raw.values.get("hidden_act") or raw.values.get("hidden_activation") or "silu"
    if activation not in ("silu", "swish") or raw.values.get("swiglu_limit") is not None:
        limited = "" if raw.values.get("swiglu_limit") is None else " with a swiglu_limit"
        raise CheckpointError(
            f"{raw.file}: experts with activation {activation}{limited} cannot be split, as expert workers compute "
            f"SwiGLU (silu) without a limit: serve this model with plain vLLM"
        )


def _cross_check(index: CheckpointIndex, moe_layers: tuple[int, ...], decoder_layers: int) -> None:
    named = index.expert_layers | index.router_layers
    extra = sorted(layer for layer in named if layer < decoder_layers and layer not in moe_layers)
    if extra:
        raise CheckpointError(
            f"{index.path}: layer {extra[0]} has routed experts by its tensor names, but config.json makes it dense: "
            f"config.json and weights are not of the same model; download both again"
        )
    if index.expert_layers and (absent := sorted(index.router_layers - index.expert_layers)):
        raise CheckpointError(_layer_absent(index, absent[0]))


def _layer_absent(index: CheckpointIndex, layer: int) -> str:
    return f"{index.path}: layer {layer} has no routed experts in the checkpoint: download the checkpoint again"


class _Keys:
    """config.json: typed look-ups that raise CheckpointError. Nested `text_config` is looked into first."""

    def __init__(self, path: Path) -> None:
        check_folder(path)
        self.file = path / "config.json"
        try:
            outer = json.loads(self.file.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no config.json: set model.path to a Hugging Face checkpoint") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file} is not readable JSON ({error}): download it again") from None
        if not isinstance(outer, dict):
            raise CheckpointError(f"{self.file} is not a JSON object: download it again")
        inner = outer.get("text_config")
        self.values: Mapping[str, object] = {**outer, **inner} if isinstance(inner, dict) else outer
        architectures = outer.get("architectures") or self.values.get("architectures")
        self.architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
        self.model_type = str(self.values.get("model_type", ""))
        dtype = self.values.get("dtype") or self.values.get("torch_dtype") or "bfloat16"
        self.dtype = str(dtype).removeprefix("torch.")
        self.tied = bool(self.values.get("tie_word_embeddings", False))

    def first_int(self, *names: str, default: int | None = None) -> int:
        """The first of these keys that is set and not null."""
        for name in names:
            value = self.values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise CheckpointError(f"{self.file}: {name} must be a whole number, not {value!r}: download it again")
            return value
        if default is None:
            raise CheckpointError(f"{self.file} has no {' or '.join(names)}: download it again")
        return default


def _is_moe(raw: _Keys, layer: int) -> bool:
    types = raw.values.get("mlp_layer_types")  # "dense" or "sparse" per layer
    if isinstance(types, list) and layer < len(types):
        return types[layer] != "dense"
    only_dense = raw.values.get("mlp_only_layers")
    if isinstance(only_dense, list) and layer in only_dense:
        return False
    frequency = raw.values.get("moe_layer_freq")
    if isinstance(frequency, list):
        return layer < len(frequency) and bool(frequency[layer])
    if layer < raw.first_int("first_k_dense_replace", default=0) or layer % raw.first_int("moe_layer_freq", default=1):
        return False
    return (layer + 1) % raw.first_int("decoder_sparse_step", default=1) == 0


def _attention_params(raw: _Keys, hidden: int) -> int:
    """One layer's attention: MLA (with or without q-LoRA) if there is a kv_lora_rank, else grouped-query attention."""
    heads = raw.first_int("num_attention_heads")
    if (rank := raw.first_int("kv_lora_rank", default=0)) == 0:
        head_dim = raw.first_int("head_dim", default=hidden // heads)
        return 2 * hidden * head_dim * (heads + raw.first_int("num_key_value_heads", default=heads))
    nope, rope, value = (raw.first_int(name) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    q_rank, q_rows = raw.first_int("q_lora_rank", default=0), heads * (nope + rope)
    query = q_rank * (hidden + q_rows) if q_rank else hidden * q_rows
    if raw.first_int("index_topk", default=0):  # sparse attention: the lightning indexer's queries, key and weights
        index_heads, index_width = raw.first_int("index_n_heads"), raw.first_int("index_head_dim")
        query += q_rank * index_heads * index_width + hidden * (index_width + index_heads)
    return query + hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden


def _expert_quant(raw: _Keys) -> ExpertQuant | None:
    quant = raw.values.get("quantization_config")
    if not isinstance(quant, dict):
        return None
    method, block = quant.get("quant_method"), quant.get("weight_block_size")
    if method != "fp8" or not isinstance(block, list) or len(block) != 2:
        raise CheckpointError(
            f"{raw.file}: quantisation {method!r} is not supported: use a checkpoint with plain weights, or FP8 with "
            f"weight_block_size (one weight_scale_inv per block)"
        )
    return ExpertQuant("fp8", (int(block[0]), int(block[1])))
