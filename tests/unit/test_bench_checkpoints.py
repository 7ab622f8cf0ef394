"""The random checkpoints are what the tests take them for: repeatable, complete, and sensitive to every part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tests.checkpoint_edits import (
    dequantised,
    drop_tensor,
    routed_expert,
    shard_files,
    tensors_of,
    truncate_shard,
    without,
)
from tests.checkpoints import SHAPES, make_checkpoint, quantise_fp8
from tests.reference import greedy_reference, make_prompts
from tests.tiny_tokenizer import VOCAB_SIZE

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_seeds_give_equal_small_files(tmp_path: Path, shape: str) -> None:
    first, again = (make_checkpoint(tmp_path / name, SHAPES[shape]) for name in ("first", "again"))
    other = make_checkpoint(tmp_path / "other", SHAPES[shape], seed=1)
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in again.iterdir())
    assert all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    assert sum(path.stat().st_size for path in first.iterdir()) < 30e6


@pytest.mark.parametrize("part", ["mlp.experts.", "shared_experts.", "e_score_correction_bias", "layernorm", "kv_b"])
def test_every_part_shows_in_the_tokens(random_checkpoint: Checkpoint, tmp_path: Path, part: str) -> None:
    checkpoint = random_checkpoint("q_lora_groups")
    changed = without(checkpoint, tmp_path / "changed", lambda name: False)
    weights = tensors_of(checkpoint)
    neutral = {name: torch.full_like(t, float("norm" in name)) if part in name else t for name, t in weights.items()}
    save_file(neutral, changed / "model.safetensors", metadata={"format": "pt"})
    prompts = make_prompts(8, VOCAB_SIZE)
    right, wrong = (greedy_reference(path, prompts, 16) for path in (checkpoint, changed))
    same = sum(a == b for a, b in zip(right.token_ids, wrong.token_ids, strict=True))
    assert same == 0, f"{same} of 8 prompts do not notice that {part} is gone"
    assert right.difference(wrong.token_ids)
    assert right.difference(right.token_ids) is None


def test_shards_have_an_index_and_split_an_expert(random_checkpoint: Checkpoint) -> None:
    checkpoint, whole = random_checkpoint("mtp", shards=3), random_checkpoint("mtp")
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == tensors_of(whole).keys()
    for shard in shard_files(checkpoint):
        with safe_open(shard, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, file in index.items() if file == shard.name}
    assert len({index[f"model.layers.1.mlp.experts.0.{proj}_proj.weight"] for proj in ("gate", "up", "down")}) == 3


def test_halves_are_disjoint_and_complete(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = random_checkpoint("q_lora_groups", shards=2)
    attention = tensors_of(without(checkpoint, tmp_path / "attention", routed_expert))
    experts = tensors_of(without(checkpoint, tmp_path / "experts", lambda name: not routed_expert(name)))
    assert not attention.keys() & experts.keys()
    assert attention.keys() | experts.keys() == tensors_of(checkpoint).keys()
    assert len(experts) == 2 * 16 * 3  # layers x experts x projections
    index = json.loads((tmp_path / "experts" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == experts.keys()


def test_damaged_copies_are_damaged(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = random_checkpoint("one_group", shards=2)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    dropped = drop_tensor(checkpoint, tmp_path / "dropped", name)
    assert tensors_of(checkpoint).keys() - tensors_of(dropped).keys() == {name}
    assert name in (dropped / "model.safetensors.index.json").read_text()
    truncated = truncate_shard(checkpoint, tmp_path / "truncated", shard=1)
    load_file(shard_files(truncated)[0])
    with pytest.raises(SafetensorError):
        load_file(shard_files(truncated)[1])


def test_fp8_experts_dequantise_to_what_was_quantised(random_checkpoint: Checkpoint, tmp_path: Path) -> None:
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    fp8, scale = quantise_fp8(weight)
    assert (fp8.dtype, scale.shape) == (torch.float8_e4m3fn, (2, 3))
    restored = fp8.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    torch.testing.assert_close(restored, weight, rtol=2**-4, atol=2**-9 * float(scale.max()))  # 3 bits of mantissa

    checkpoint = random_checkpoint("fp8")
    stored, plain = tensors_of(checkpoint), tensors_of(dequantised(checkpoint, tmp_path / "plain"))
    assert {name for name in stored if not name.endswith("_scale_inv")} == plain.keys()
    assert {tensor.dtype for tensor in plain.values()} == {torch.float32}
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    corner = stored[name][128:, :128].float() * stored[f"{name}_scale_inv"][1, 0]
    torch.testing.assert_close(plain[name][128:, :128], corner, rtol=0, atol=0)


def test_tokenizer_takes_any_text_and_chats(random_checkpoint: Checkpoint) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_checkpoint("qwen3_moe"))
    text = "def naïve(x):\n\treturn '漢字' + x  # 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < VOCAB_SIZE == len(tokenizer)
    messages = [{"role": "user", "content": "hi"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert chat == "<bos>user: hi\nassistant: "
