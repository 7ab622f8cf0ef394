"""Loading experts: the right values, no byte of anybody else's, FP8 against a float64 reference, clear refusals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.errors import CheckpointError
from cluster.model.checkpoint import load_checkpoint_index
from cluster.model.spec import load_model_spec
from deployments.experts.forms import Form, choose_form
from deployments.experts.loading import load_experts
from deployments.experts.weights import ExpertWeights
from deployments.hosting.fp8_blocks import dequantise
from tests.checkpoint_edits import dequantised, drop_tensor, shard_files, tensors_of, truncate_shard, without
from tests.checkpoints import SHAPES

MakeCheckpoint = Callable[..., Path]
PLAIN = {"float32": Form.FLOAT32, "bfloat16": Form.BFLOAT16}


def load(path: Path, assignment: dict[int, list[int]], dtype: str = "float32") -> ExpertWeights:
    return load_experts(load_checkpoint_index(path), load_model_spec(path), assignment, PLAIN[dtype])


def assert_holds(weights: ExpertWeights, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for layer, held in weights.layers.items():
        assert held.ids
        for local, expert in enumerate(held.ids):
            at = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up = held.gate_up[local].chunk(2)
            for name, ours in (("gate_proj", gate), ("up_proj", up), ("down_proj", held.down[local])):
                assert ours.dtype == dtype
                assert torch.equal(ours, tensors[f"{at}.{name}.weight"].to(dtype))


@pytest.mark.parametrize("shape", ["q_lora_groups", "sixty_experts", "mtp", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_subset_of_experts(random_checkpoint: MakeCheckpoint, shape: str, dtype: str) -> None:
    path = random_checkpoint(shape, shards=3)
    layers = SHAPES[shape].moe_layers
    count = SHAPES[shape].num_experts
    assignment = {layer: [count - 1, 0, layer + 2] for layer in layers}  # unsorted, another subset in each layer
    weights = load(path, assignment, dtype)
    assert {layer: list(held.ids) for layer, held in weights.layers.items()} == {
        layer: sorted(ids) for layer, ids in assignment.items()
    }
    assert_holds(weights, tensors_of(path), getattr(torch, dtype))
    spec = load_model_spec(path)
    assert weights.nbytes == 3 * len(layers) * spec.expert_bytes(dtype)


def test_reads_its_own_tensors_only(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = random_checkpoint("sixty_experts", shards=4)
    mine = {1: [3, 59], 2: [0, 7, 8]}
    held = {f"model.layers.{layer}.mlp.experts.{expert}." for layer, ids in mine.items() for expert in ids}
    bare = without(path, tmp_path / "bare", lambda name: not name.startswith(tuple(held)))
    assert len(tensors_of(bare)) == 5 * 3
    weights = load(bare, mine)
    assert_holds(weights, tensors_of(path), torch.float32)
    assert weights.bytes_read == sum(tensor.nbytes for tensor in tensors_of(bare).values())
    assert load(path, mine).bytes_read == weights.bytes_read


def test_opens_only_the_shards_it_needs(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = truncate_shard(random_checkpoint("sixty_experts", shards=4), tmp_path / "copy", keep=1)
    index = load_checkpoint_index(path)
    needed = {tensor.shard for tensor in index.expert_tensors[1, 5]}
    for shard in shard_files(path):
        if shard.name not in needed:
            shard.write_bytes(b"not a shard")
    assert len(needed) < 4
    assert load(path, {1: [5]}).layers[1].ids == (5,)


def test_progress_counts_every_expert_and_ends_at_the_total(random_checkpoint: MakeCheckpoint) -> None:
    path = random_checkpoint("fp8", dtype="bfloat16")
    seen: list[tuple[int, int]] = []
    spec, index = load_model_spec(path), load_checkpoint_index(path)
    weights = load_experts(
        index, spec, {1: [0, 1]}, Form.BFLOAT16, on_progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(weights.nbytes // 2, weights.nbytes), (weights.nbytes, weights.nbytes)]
    assert weights.bytes_read == 2 * spec.expert_bytes("fp8")


def test_fp8_checkpoint_is_dequantised(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = random_checkpoint("fp8", dtype="bfloat16")
    plain = tensors_of(dequantised(path, tmp_path / "plain"))
    assert_holds(load(path, {1: [0, 5], 2: [15]}), plain, torch.float32)
    assert_holds(load(path, {1: [0, 5], 2: [15]}, "bfloat16"), plain, torch.bfloat16)


@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (1, 1), (127, 129), (300, 130), (96, 512)])
def test_dequantise_against_float64(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(rows, columns, generator=generator) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // 128), -(-columns // 128), generator=generator) + 0.01
    exact = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(0, columns, 128):
            cells = weight[row, column : column + 128].double()
            exact[row, column : column + 128] = cells * scale[row // 128, column // 128].double()
    for dtype, bound in ((torch.float32, 2**-24), (torch.bfloat16, 2**-8 * 1.0001)):
        out = torch.empty(rows, columns, dtype=dtype)
        dequantise(weight, scale, (128, 128), out)
        assert ((out.double() - exact).abs() <= bound * exact.abs()).all()


def test_scales_in_bfloat16_are_read_too(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """As Qwen3's FP8 checkpoints store them."""
    path = random_checkpoint("fp8", dtype="bfloat16")
    shutil.copytree(path, tmp_path / "copy")
    (shard,) = shard_files(tmp_path / "copy")
    rounded = {
        name: tensor.bfloat16() if name.endswith("_scale_inv") else tensor
        for name, tensor in tensors_of(path).items()
    }
    save_file(rounded, shard, metadata={"format": "pt"})
    plain = tensors_of(dequantised(tmp_path / "copy", tmp_path / "plain"))
    assert_holds(load(tmp_path / "copy", {1: [0, 5]}), plain, torch.float32)
    index, spec = load_checkpoint_index(tmp_path / "copy"), load_model_spec(tmp_path / "copy")
    if choose_form("auto", "auto", spec, "cpu") is not Form.PACKED_FP8:
        return  # this host dequantises
    kept = load_experts(index, spec, {1: [5]}, Form.PACKED_FP8).layers[1]
    assert kept.down_scale is not None
    assert torch.equal(kept.down_scale[0], rounded["model.layers.1.mlp.experts.5.down_proj.weight_scale_inv"].float())


def test_every_fp8_value_is_read_right() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(1, 256)
    out = torch.empty(1, 256)
    dequantise(every, torch.tensor([[0.5, 2.0]]), (128, 128), out)
    code = torch.arange(256)
    sign, exponent, mantissa = 1 - 2.0 * (code >> 7), (code >> 3) & 15, code & 7
    value = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7)) * sign
    value[(exponent == 15) & (mantissa == 7)] = torch.nan
    assert torch.equal(out.nan_to_num(nan=1e9), (value * torch.where(code < 128, 0.5, 2.0)).nan_to_num(nan=1e9)[None])


def test_memory_peaks_near_the_weights_own_size(tmp_path: Path) -> None:
    """In a process of its own: peak resident memory during the load, over the weights' bytes."""
    script = f"""
import sys
from pathlib import Path
path = Path({str(tmp_path / "big")!r})
if sys.argv[1] == "make":
    from tests.checkpoints import Shape, make_checkpoint
    shape = Shape(hidden_size=1024, moe_intermediate_size=512, num_layers=2, num_experts=32, fp8_experts=True)
    make_checkpoint(path, shape, dtype="bfloat16")
else:
    from cluster.model.spec import load_checkpoint_index, load_model_spec
    from deployments.experts.forms import Form, choose_form
    from deployments.experts.loading import load_experts
    def kib(key):
        return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
    index, spec = load_checkpoint_index(path), load_model_spec(path)
    form = Form.BFLOAT16 if sys.argv[1] == "plain" else choose_form(sys.argv[1], "auto", spec, "cpu")
    load_experts(index, spec, {{1: [0]}}, form)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = kib("VmRSS")
    weights = load_experts(index, spec, {{1: range(32)}}, form)
    print((kib("VmHWM") - before) * 1024 / weights.nbytes, "vllm" in sys.modules)
"""
    root = Path(__file__).resolve().parents[4]
    for step in ("make", "plain", "auto", "int8"):
        command = [sys.executable, "-c", script, step]
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, check=True, cwd=root, env=env, stdout=subprocess.PIPE, text=True)
        if step != "make":
            ratio, imported = run.stdout.split()
            # One expert per reading thread beside the final weights, and what packing it takes: 32 are held here.
            assert float(ratio) < 1.5, step
            assert imported == "False"


def refuses(message: str) -> object:
    return pytest.raises(CheckpointError, match=message)


def test_a_tensor_missing_from_its_shard(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    broken = drop_tensor(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", name)
    with refuses(f"tensor {re.escape(name)} is missing from shard .*, where the index has it: download this shard"):
        load(broken, {1: [3]})
    assert load(broken, {1: [4]}).layers[1].ids == (4,)


def test_a_tensor_missing_from_the_index(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    broken = without(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", lambda other: other == name)
    with refuses("layer 1, expert 3 has no up projection in the checkpoint's index: download the checkpoint again"):
        load(broken, {1: [3]})


def test_an_expert_that_the_model_does_not_have(random_checkpoint: MakeCheckpoint) -> None:
    with refuses("layer 0, expert 3 has no gate projection"):
        load(random_checkpoint("q_lora_groups"), {0: [3]})


def test_a_truncated_shard(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    broken = truncate_shard(random_checkpoint("q_lora_groups", shards=3), tmp_path / "copy", shard=1, keep=0.9)
    shard = shard_files(broken)[1]
    mine = next(
        key for key, tensors in load_checkpoint_index(broken).expert_tensors.items()
        if any(tensor.shard == shard.name for tensor in tensors)
    )  # fmt: skip
    with refuses(f"shard {shard} is truncated: {shard.stat().st_size} bytes, but its header says"):
        load(broken, {mine[0]: [mine[1]]})


def test_weights_of_another_model(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    copy = without(random_checkpoint("q_lora_groups"), tmp_path / "copy", lambda name: False)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(config.replace('"moe_intermediate_size": 64', '"moe_intermediate_size": 80'))
    with refuses(r"has shape \[64, 128\], but config.json makes it \[80, 128\]: .* download both again"):
        load(copy, {1: [3]})


def test_fp8_without_its_scales(random_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = random_checkpoint("fp8", dtype="bfloat16")
    broken = without(path, tmp_path / "copy", lambda name: name.endswith("experts.3.up_proj.weight_scale_inv"))
    with refuses("up_proj.weight in .* is FP8 without a weight_scale_inv: download the checkpoint again"):
        load(broken, {1: [3]})
