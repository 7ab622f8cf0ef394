"""What a checkpoint's `config.json` says about the model: the shape that planning and splitting need. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.checkpoint import CheckpointIndex, is_routed_expert, load_checkpoint_index
from cluster.errors import CheckpointError

__all__ = [
    "CheckpointIndex",
    "ExpertQuant",
    "ModelSpec",
    "check_experts",
    "is_routed_expert",
    "load_checkpoint_index",
    "load_model_spec",
]

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ExpertQuant:
    """Block-quantised weights: FP8 E4M3 with one float32 scale per block (DeepSeek-V3 report, section 3.3.2)."""

    method: str
    block_shape: tuple[int, int]


@dataclass(frozen=True)
class ModelSpec:
    """Shape of one MoE model. Layer indices count decoder layers; MTP layers follow at `num_hidden_layers` and up."""

    path: Path
    architecture: str
    model_type: str
    hidden_size: int
    moe_intermediate_size: int
    num_experts: int  # routed experts per MoE layer
    top_k: int
    num_shared_experts: int
    num_hidden_layers: int
    num_mtp_layers: int
    vocab_size: int
    max_position_embeddings: int
    moe_layers: tuple[int, ...]  # with routed experts, MTP layers included
    dtype: str
    expert_quant: ExpertQuant | None

    @property
    def expert_params(self) -> int:
        """Parameters of one routed expert: gate and up [I, H], down [H, I]."""
        return 3 * self.hidden_size * self.moe_intermediate_size

    def expert_bytes(self, dtype: str) -> int:
        """Memory of one routed expert held in `dtype`."""
        return self.expert_params * DTYPE_BYTES[dtype]

    @property
    def routed_params(self) -> int:
        """Parameters of all routed experts, MTP layers included."""
        return self.expert_params * self.num_experts * len(self.moe_layers)


def load_model_spec(path: Path | str) -> ModelSpec:
    """Read `config.json`, and from the checkpoint's index whether there are MTP layers.

    Raises CheckpointError, naming the fix, if the folder or file is missing, is not JSON, or is not an MoE model.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"model path {path} does not exist{_nearest(path)}; set model.path")
    raw = _read_json(path / "config.json")
    text: Mapping[str, Any] = raw.get("text_config") or raw
    architecture = (raw.get("architectures") or text.get("architectures") or ["unknown"])[0]
    num_experts = _first(text, "n_routed_experts", "num_experts", "num_local_experts")
    if not num_experts:
        raise CheckpointError(
            f"{path} is not a mixture-of-experts model ({architecture} has no n_routed_experts, num_experts or "
            f"num_local_experts): there is nothing to split; serve it with vLLM alone"
        )
    layers = int(text["num_hidden_layers"])
    spec = ModelSpec(
        path=path,
        architecture=architecture,
        model_type=raw.get("model_type", "unknown"),
        hidden_size=_need(text, path, "hidden_size"),
        moe_intermediate_size=_need(text, path, "moe_intermediate_size", "intermediate_size"),
        num_experts=num_experts,
        top_k=_need(text, path, "num_experts_per_tok", "num_experts_per_token"),
        num_shared_experts=_first(text, "n_shared_experts", "num_shared_experts") or 0,
        num_hidden_layers=layers,
        num_mtp_layers=0,
        vocab_size=_need(text, path, "vocab_size"),
        max_position_embeddings=_first(text, "max_position_embeddings") or 0,
        moe_layers=tuple(layer for layer in range(layers) if _is_moe(text, layer)),
        dtype=raw.get("dtype") or raw.get("torch_dtype") or text.get("dtype") or text.get("torch_dtype") or "bfloat16",
        expert_quant=_quant(raw.get("quantization_config") or text.get("quantization_config")),
    )
    # MTP layers exist where the checkpoint has them, whatever the config says: many copies leave them out.
    present = {int(found[1]) for name in load_checkpoint_index(path).weight_map if (found := _LAYER.search(name))}
    mtp = tuple(layer for layer in sorted(present) if layer >= layers)
    return dataclasses.replace(spec, num_mtp_layers=len(mtp), moe_layers=spec.moe_layers + mtp)


def check_experts(spec: ModelSpec, index: CheckpointIndex) -> None:
    """Every MoE layer has every routed expert, by the tensors' names. Raises CheckpointError."""
    found: dict[int, set[int]] = {}
    for layer, expert in index.expert_tensors:
        found.setdefault(layer, set()).add(expert)
    absent = [layer for layer in spec.moe_layers if layer not in found]
    if absent:
        raise CheckpointError(
            f"{spec.path}: layer(s) {', '.join(map(str, absent[:8]))} should have {spec.num_experts} routed experts by "
            f"config.json, but the checkpoint has no tensor of them: download the missing shards, or mend the index"
        )
    for layer in spec.moe_layers:
        missing = sorted(set(range(spec.num_experts)) - found[layer])
        if missing:
            raise CheckpointError(
                f"{spec.path}: layer {layer} lacks routed expert(s) {', '.join(map(str, missing[:8]))} of "
                f"{spec.num_experts}: download the missing shards, or mend the index"
            )


def _is_moe(text: Mapping[str, Any], layer: int) -> bool:
    """Whether a decoder layer has routed experts, by the rules of DeepSeek's and Qwen's configurations."""
    if layer < (text.get("first_k_dense_replace") or 0) or layer in (text.get("mlp_only_layers") or ()):
        return False
    if "decoder_sparse_step" in text:
        return (layer + 1) % text["decoder_sparse_step"] == 0
    return layer % (text.get("moe_layer_freq") or 1) == 0


def _quant(quantization: Mapping[str, Any] | None) -> ExpertQuant | None:
    if quantization is None:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8" or not block:
        raise CheckpointError(
            f"routed experts quantised with {method!r} (blocks {block}) are not supported: expert workers read "
            f"unquantised weights and FP8 with weight_block_size, as DeepSeek-V3's"
        )
    return ExpertQuant(method, (block[0], block[1]))


def _first(text: Mapping[str, Any], *keys: str) -> int | None:
    return next((int(text[key]) for key in keys if text.get(key) is not None), None)


def _need(text: Mapping[str, Any], path: Path, *keys: str) -> int:
    value = _first(text, *keys)
    if value is None:
        raise CheckpointError(f"{path / 'config.json'} has no {' or '.join(keys)}: is it the model's own config.json?")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: model.path must be a Hugging Face checkpoint folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object: is it the model's own config.json?")
    return data


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" ({path.parent} does not either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir() if entry.is_dir()], n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
