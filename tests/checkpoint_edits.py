"""Changed copies of a checkpoint: tensors removed, a shard cut short, FP8 experts turned into plain ones.

Every function takes an existing checkpoint, leaves it as it is, and returns the changed copy in `folder`.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import FP8_BLOCK

INDEX = "model.safetensors.index.json"


def routed_expert(name: str) -> bool:
    """Whether a tensor belongs to a routed expert, in the names that `tests.checkpoints` writes."""
    return ".mlp.experts." in name


def without(checkpoint: Path, folder: Path, remove: Callable[[str], bool]) -> Path:
    """A copy without the tensors whose name `remove` picks; the index loses them too, empty shards are left out.

    `without(path, folder, routed_expert)` is what an attention replica must be able to live on, and
    `without(path, folder, lambda name: not routed_expert(name))` what expert workers must.
    """
    _copy_all_but_tensors(checkpoint, folder)
    for shard in shard_files(checkpoint):
        kept = {name: tensor for name, tensor in load_file(shard).items() if not remove(name)}
        if kept:
            save_file(kept, folder / shard.name, metadata={"format": "pt"})
    _remove_from_index(folder, remove)
    return folder


def drop_tensor(checkpoint: Path, folder: Path, name: str) -> Path:
    """A copy without one tensor, whose name the index (if there is one) still promises."""
    _copy_all_but_tensors(checkpoint, folder)
    found = False
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        found |= tensors.pop(name, None) is not None
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    assert found, f"{checkpoint} has no tensor {name}"
    return folder


def truncate_shard(checkpoint: Path, folder: Path, shard: int = 0, keep: float = 0.5) -> Path:
    """A copy whose `shard`-th file ends after the fraction `keep` of its bytes, as a download cut short does."""
    shutil.copytree(checkpoint, folder)
    file = shard_files(folder)[shard]
    os.truncate(file, int(file.stat().st_size * keep))
    return folder


def dequantised(checkpoint: Path, folder: Path) -> Path:
    """A float32 copy of a checkpoint with FP8 weights, without its quantisation: what the reference can load."""
    _copy_all_but_tensors(checkpoint, folder)
    everything = tensors_of(checkpoint)
    for shard in shard_files(checkpoint):
        tensors = load_file(shard)
        plain = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
        for name in plain:
            if (scale := everything.get(f"{name}_scale_inv")) is not None:
                full = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
                plain[name] *= full[: plain[name].shape[0], : plain[name].shape[1]]
        save_file(plain, folder / shard.name, metadata={"format": "pt"})
    _remove_from_index(folder, lambda name: name.endswith("_scale_inv"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=2) + "\n")
    return folder


def _remove_from_index(folder: Path, remove: Callable[[str], bool]) -> None:
    if (index := folder / INDEX).exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {name: file for name, file in content["weight_map"].items() if not remove(name)}
        index.write_text(json.dumps(content, indent=2) + "\n")


def shard_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order."""
    return sorted(checkpoint.glob("*.safetensors"))


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name."""
    return {name: tensor for shard in shard_files(checkpoint) for name, tensor in load_file(shard).items()}


def _copy_all_but_tensors(checkpoint: Path, folder: Path) -> None:
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.safetensors"))
