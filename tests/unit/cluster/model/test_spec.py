"""The model spec: key names of every family, true sizes, contradictions with the tensor names refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from cluster.model.spec import (
    ExpertQuant,
    ModelSpec,
    check_experts,
    is_routed_expert,
    load_checkpoint_index,
    load_model_spec,
)
from tests.checkpoint_edits import tensors_of, without
from tests.checkpoints import SHAPES

MakeCheckpoint = Callable[..., Path]
V3 = Path(__file__).resolve().parents[4] / "examples" / "deepseek-v3"

COMMON: Mapping[str, object] = {
    "architectures": ["X"], "hidden_size": 64, "num_hidden_layers": 6, "vocab_size": 100, "num_attention_heads": 4,
    "max_position_embeddings": 128, "num_experts_per_tok": 2, "intermediate_size": 96, "torch_dtype": "bfloat16",
}  # fmt: skip


def spec_of(folder: Path, **keys: object) -> ModelSpec:
    (folder / "config.json").write_text(json.dumps({**COMMON, **keys}))
    return load_model_spec(folder)


def routed_params(spec: ModelSpec) -> int:
    """Parameters of all routed experts, MTP layers included."""
    return spec.expert_params * spec.num_experts * len(spec.moe_layers)


def test_deepseek_v3_has_671_billion_parameters_and_37_active(tmp_path: Path) -> None:
    """Published: 671 B in all, 36.7 B active with the head (DeepSeek-V3's README_WEIGHTS.md; "37 B" in the report)."""
    (tmp_path / "config.json").write_text((V3 / "config.json").read_text())  # from the config alone
    spec = load_model_spec(tmp_path)
    layers = sum(layer < spec.num_hidden_layers for layer in spec.moe_layers)
    total = spec.attention_params + layers * spec.num_experts * spec.expert_params
    assert total == pytest.approx(671e9, rel=0.002)
    embedding = spec.vocab_size * spec.hidden_size  # looked up, not multiplied
    active = spec.attention_params - embedding + layers * spec.top_k * spec.expert_params
    assert active == pytest.approx(36.7e9, rel=0.005)
    # 685 B is Hugging Face's count: the MTP module with its own experts, embedding and head.
    assert routed_params(spec) + spec.attention_params + spec.mtp_attention_params == pytest.approx(685e9, rel=0.002)
    assert (spec.num_experts, spec.top_k, spec.num_shared_experts) == (256, 8, 1)
    assert spec.moe_layers == tuple(range(3, 62))
    assert spec.expert_quant == ExpertQuant("fp8", (128, 128))
    assert spec.expert_params == 3 * 7168 * 2048
    assert spec.expert_bytes("bfloat16") == 2 * spec.expert_params
    assert spec.expert_bytes("fp8") == spec.expert_params + 4 * 3 * 56 * 16


def test_with_its_index_deepseek_v3_is_the_same(tmp_path: Path) -> None:
    spec = load_model_spec(V3)
    assert spec.moe_layers == tuple(range(3, 62))
    assert spec.num_mtp_layers == 1
    check_experts(load_checkpoint_index(V3), spec)


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_parameter_counts_are_those_of_the_tensors(random_checkpoint: MakeCheckpoint, shape: str) -> None:
    path = random_checkpoint(shape)
    spec = load_model_spec(path)
    # Matrices only: the counts leave norms and biases out. MTP layers are the last ones.
    sizes = {
        name: tensor.numel()
        for name, tensor in tensors_of(path).items()
        if tensor.ndim == 2 and "_scale_inv" not in name
    }
    mtp = tuple(f"model.layers.{layer}." for layer in spec.moe_layers if layer >= spec.num_hidden_layers)
    rest = {name: size for name, size in sizes.items() if not is_routed_expert(name)}
    assert routed_params(spec) == sum(sizes.values()) - sum(rest.values())
    assert spec.mtp_attention_params == sum(size for name, size in rest.items() if name.startswith(mtp or ("-",)))
    assert spec.attention_params + spec.mtp_attention_params == sum(rest.values())
    assert spec.moe_layers == SHAPES[shape].moe_layers
    assert spec.num_mtp_layers == SHAPES[shape].num_mtp_layers
    check_experts(load_checkpoint_index(path), spec)


@pytest.mark.parametrize(
    ("keys", "experts", "inner", "shared", "layers"),
    [
        # DeepSeek V2/V3/R1, Kimi-K2
        ({"n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": 2, "first_k_dense_replace": 1,
          "moe_layer_freq": 1}, 8, 32, 2, (1, 2, 3, 4, 5)),
        ({"n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": None, "first_k_dense_replace": 1,
          "moe_layer_freq": 2}, 8, 32, 0, (2, 4)),
        # GLM4-MoE: the same names, no moe_layer_freq
        ({"n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 3},
         8, 32, 1, (3, 4, 5)),
        # Qwen2-MoE: a shared expert of its own size
        ({"num_experts": 8, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 128,
          "decoder_sparse_step": 2, "mlp_only_layers": []}, 8, 32, 1, (1, 3, 5)),
        # Qwen3-MoE
        ({"num_experts": 8, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [0, 4]},
         8, 32, 0, (1, 2, 3, 5)),
        # Mixtral: experts as wide as intermediate_size
        ({"num_local_experts": 8}, 8, 96, 0, (0, 1, 2, 3, 4, 5)),
        # A frequency per layer, and transformers 5's layer types
        ({"n_routed_experts": 8, "moe_intermediate_size": 32, "moe_layer_freq": [0, 1, 0, 1, 1, 0]},
         8, 32, 0, (1, 3, 4)),
        ({"num_experts": 8, "moe_intermediate_size": 32, "mlp_layer_types": ["dense"] * 4 + ["sparse"] * 2},
         8, 32, 0, (4, 5)),
    ],
)  # fmt: skip
def test_key_names_of_every_family(
    tmp_path: Path, keys: Mapping[str, object], experts: int, inner: int, shared: int, layers: tuple[int, ...]
) -> None:
    spec = spec_of(tmp_path, **keys)
    assert (spec.num_experts, spec.moe_intermediate_size, spec.num_shared_experts) == (experts, inner, shared)
    assert spec.moe_layers == layers


def test_nested_text_config_and_new_dtype_key(tmp_path: Path) -> None:
    text = {**COMMON, "n_routed_experts": 8, "moe_intermediate_size": 32, "torch_dtype": None, "dtype": "float16"}
    outer = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "outer", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    spec = load_model_spec(tmp_path)
    assert (spec.architecture, spec.num_experts, spec.dtype) == ("KimiK25ForConditionalGeneration", 8, "float16")


def test_mtp_layers_count_only_where_the_checkpoint_has_them(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = random_checkpoint("mtp")
    assert load_model_spec(path).moe_layers == (1, 2, 3)
    bare = without(path, tmp_path / "bare", lambda name: name.startswith("model.layers.3."))
    spec = load_model_spec(bare)
    assert (spec.moe_layers, spec.num_mtp_layers) == ((1, 2), 0)


def test_either_half_of_a_checkpoint_has_the_spec_of_the_whole(
    random_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    path = random_checkpoint("mtp")
    whole = load_model_spec(path)
    attention = load_model_spec(without(path, tmp_path / "attention", is_routed_expert))
    experts = load_model_spec(without(path, tmp_path / "experts", lambda name: not is_routed_expert(name)))
    assert attention.moe_layers == experts.moe_layers == whole.moe_layers
    assert attention.attention_params == experts.attention_params == whole.attention_params


def refuses(message: str) -> object:
    return pytest.raises(CheckpointError, match=message)


def test_a_missing_path_names_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "deepseek-v3").mkdir()
    (tmp_path / "qwen").mkdir()
    with refuses(f"model path {tmp_path}/deepseek-v2 does not exist: did you mean {tmp_path}/deepseek-v3\\?"):
        load_model_spec(tmp_path / "deepseek-v2")
    with refuses("model path .*/config.json is not a folder"):
        (tmp_path / "config.json").touch()
        load_model_spec(tmp_path / "config.json")
    with refuses("does not exist: set model.path to the folder that holds config.json"):
        load_model_spec(tmp_path / "no" / "such" / "folder")


def test_no_config_json(tmp_path: Path) -> None:
    with refuses(f"{tmp_path} has no config.json: set model.path to a Hugging Face checkpoint"):
        load_model_spec(tmp_path)


@pytest.mark.parametrize(("content", "message"), [("{", "is not readable JSON"), ("[]", "is not a JSON object")])
def test_bad_config_json(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with refuses(f"config.json {message}.*: download it again"):
        load_model_spec(tmp_path)


def test_not_an_moe_model(tmp_path: Path) -> None:
    with refuses("is not a mixture-of-experts model .LlamaForCausalLM has no .*nothing can be split"):
        spec_of(tmp_path, architectures=["LlamaForCausalLM"])


@pytest.mark.parametrize("keys", [{"hidden_act": "gelu"}, {"hidden_activation": "relu2"}, {"swiglu_limit": 7.0}])
def test_experts_that_workers_cannot_compute_are_refused(tmp_path: Path, keys: Mapping[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be split, as expert workers compute SwiGLU .*plain vLLM"):
        spec_of(tmp_path, num_experts=4, **keys)
    assert spec_of(tmp_path, num_experts=4, hidden_act="silu", swiglu_limit=None).num_experts == 4


def test_a_key_missing_or_wrong(tmp_path: Path) -> None:
    with refuses("config.json has no hidden_size: download it again"):
        spec_of(tmp_path, num_experts=8, hidden_size=None)
    with refuses("hidden_size must be a whole number, not 'wide'"):
        spec_of(tmp_path, num_experts=8, hidden_size="wide")


def test_a_quantisation_that_cannot_be_read(tmp_path: Path) -> None:
    with refuses("quantisation 'awq' is not supported: use a checkpoint with plain weights, or FP8"):
        spec_of(tmp_path, num_experts=8, quantization_config={"quant_method": "awq"})


def test_an_absent_expert_layer(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = random_checkpoint("q_lora_groups")
    broken = without(path, tmp_path / "a", lambda name: name.startswith("model.layers.2.mlp.experts."))
    with refuses("layer 2 has no routed experts in the checkpoint: download"):
        load_model_spec(broken)
    # Without its router too, only the whole can tell.
    broken = without(path, tmp_path / "b", lambda name: name.startswith("model.layers.2."))
    with refuses("layer 2 has no routed experts in the checkpoint: download"):
        check_experts(load_checkpoint_index(broken), load_model_spec(broken))


def test_an_absent_expert_tensor(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    broken = without(random_checkpoint("q_lora_groups", shards=2), tmp_path / "copy", lambda other: other == name)
    with refuses("layer 1, expert 3 has no up projection in the index: download"):
        check_experts(load_checkpoint_index(broken), load_model_spec(broken))


def test_a_config_of_another_model(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy = without(random_checkpoint("q_lora_groups"), tmp_path / "copy", lambda name: False)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "first_k_dense_replace": 2}))
    with refuses(re.escape("layer 1 has routed experts by its tensor names, but config.json makes it dense")):
        load_model_spec(copy)
