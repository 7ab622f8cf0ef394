"""Experts loaded and dropped while others are computed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.errors import CheckpointError, StalePlacement
from cluster.model.spec import load_checkpoint_index, load_model_spec
from deployments.experts import store as store_module
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form, choose_form
from deployments.experts.loading import load_experts
from deployments.experts.sparse_memory import SparseStack
from deployments.experts.store import ExpertStore
from tests.checkpoint_edits import drop_tensor

MakeCheckpoint = Callable[..., Path]
ALL = range(60)


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: MakeCheckpoint) -> Path:
    return random_checkpoint("sixty_experts")


def store_of(path: Path, form: Form = Form.FLOAT32, device: str = "cpu", **first: list[int]) -> ExpertStore:
    index, spec = load_checkpoint_index(path), load_model_spec(path)
    share = dict.fromkeys(spec.moe_layers, tuple(first.get("first", [])))
    made = ExpertStore(index, spec, form, device, share)
    made.load(share)
    return made


def one_row(compute: ExpertCompute, expert: int, layer: int = 1) -> torch.Tensor:
    hidden_1H = torch.linspace(-1, 1, 128)[None]
    return compute.forward(layer, hidden_1H, torch.tensor([[expert]], dtype=torch.int16), torch.ones(1, 1)).clone()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_loaded_at_any_time_they_compute_the_same(checkpoint: Path, dtype: str) -> None:
    index, spec = load_checkpoint_index(checkpoint), load_model_spec(checkpoint)
    form = choose_form(dtype, "auto", spec, "cpu")
    whole = ExpertCompute(load_experts(index, spec, dict.fromkeys(spec.moe_layers, ALL), form), threads=1)
    store = store_of(checkpoint, form, first=[3, 7])
    compute = ExpertCompute(store.weights, threads=1)
    compute.serve(store.held)
    assert torch.equal(one_row(compute, 7), one_row(whole, 7))
    with pytest.raises(StalePlacement, match=r"layer 1: expert\(s\) 8 not held by this worker"):
        one_row(compute, 8)

    before = store.nbytes
    store.load({1: (8, 3), 2: (59,)})  # 3 is there already
    compute.serve(store.held)
    assert torch.equal(one_row(compute, 8), one_row(whole, 8))
    assert torch.equal(one_row(compute, 59, layer=2), one_row(whole, 59, layer=2))
    assert store.nbytes == before + store.nbytes_of({1: (8,), 2: (59,)})

    compute.serve(store.drop({1: (7,)}))
    store.release({1: (7,)})
    assert store.held[1] == (3, 8)
    with pytest.raises(StalePlacement):
        one_row(compute, 7)
    store.load({1: (7,)})
    compute.serve(store.held)
    assert torch.equal(one_row(compute, 7), one_row(whole, 7))


def test_a_load_that_fails_leaves_what_was_there(checkpoint: Path, tmp_path: Path) -> None:
    broken = drop_tensor(checkpoint, tmp_path / "copy", "model.layers.1.mlp.experts.9.up_proj.weight")
    store = store_of(broken, first=[3])
    with pytest.raises(CheckpointError):
        store.load({1: (8, 9)})
    assert store.held[1] == (3,)
    compute = ExpertCompute(store.weights, threads=1)
    compute.serve(store.held)
    one_row(compute, 3)


def test_without_address_space_the_first_share_stays(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> SparseStack:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(store_module, "SparseStack", refuse)
    store = store_of(checkpoint, first=[3, 7])
    assert not store.elastic
    compute = ExpertCompute(store.weights, threads=1)
    compute.serve(store.held)
    assert one_row(compute, 7).shape == (1, 128)


def test_rows_are_right_or_stale_while_experts_come_and_go(checkpoint: Path) -> None:
    store = store_of(checkpoint, first=list(ALL))
    compute = ExpertCompute(store.weights, threads=1)
    compute.serve(store.held)
    right = {expert: one_row(compute, expert) for expert in ALL}
    over, wrong, seen = threading.Event(), [], {"right": 0, "stale": 0}

    def ask() -> None:
        while not over.is_set():
            for expert in ALL:
                try:
                    if torch.equal(one_row(compute, expert), right[expert]):
                        seen["right"] += 1
                    else:
                        wrong.append(expert)
                except StalePlacement:
                    seen["stale"] += 1

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        while (seen["right"] < 500 or seen["stale"] < 100) and not wrong:
            some = {1: tuple(ALL[::2])}
            compute.serve(store.drop(some))
            store.release(some)
            store.load(some)
            compute.serve(store.held)
    finally:
        over.set()
        asking.join()
    assert not wrong


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_there_for_what_was_written_only() -> None:
    before, part = resident_bytes(), 16 << 20
    stack = SparseStack((1000, part // 4), torch.float32)  # 16 GiB
    assert resident_bytes() - before < part
    stack.tensor[500] = 1.0
    stack.tensor[501] = 2.0
    assert part < resident_bytes() - before < 4 * part
    stack.release(500)
    assert resident_bytes() - before < 2 * part
    assert stack.tensor[500].sum() == 0
    assert stack.tensor[501, 0] == stack.tensor[501, -1] == 2.0


def test_a_release_spares_the_neighbours_that_share_a_page() -> None:
    stack = SparseStack((8, 1000), torch.float32)  # 4,000 bytes each
    stack.tensor.copy_(torch.arange(8.0)[:, None].expand(8, 1000))
    for part in (2, 5):
        stack.release(part)
    for part in (0, 1, 3, 4, 6, 7):
        assert (stack.tensor[part] == part).all()
