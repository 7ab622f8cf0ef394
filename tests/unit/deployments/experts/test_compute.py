"""Expert arithmetic against a float64 reference, one token and one expert at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.errors import FrameError, StalePlacement
from cluster.model.checkpoint import load_checkpoint_index
from cluster.model.spec import load_model_spec
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import choose_form
from deployments.experts.loading import load_experts
from tests.checkpoint_edits import tensors_of

MakeCheckpoint = Callable[..., Path]
HIDDEN, EXPERTS = 128, 60


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint: MakeCheckpoint) -> Path:
    return random_checkpoint("sixty_experts")


def compute_of(path: Path, experts: list[int], dtype: str = "float32") -> ExpertCompute:
    spec = load_model_spec(path)
    assignment = dict.fromkeys(spec.moe_layers, experts)
    form = choose_form(dtype, "auto", spec, "cpu")
    return ExpertCompute(load_experts(load_checkpoint_index(path), spec, assignment, form), threads=1)


def reference(
    path: Path, layer: int, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    tensors, out = tensors_of(path), torch.zeros(hidden_TH.shape, dtype=torch.float64)
    for t, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                at, x = f"model.layers.{layer}.mlp.experts.{expert}", hidden_TH[t].double()
                gate = tensors[f"{at}.gate_proj.weight"].double() @ x
                up = tensors[f"{at}.up_proj.weight"].double() @ x
                out[t] += weight * (tensors[f"{at}.down_proj.weight"].double() @ (gate / (1 + (-gate).exp()) * up))
    return out


def some_hidden(tokens: int, size: int = HIDDEN) -> torch.Tensor:
    return torch.randn(tokens, size, generator=torch.Generator().manual_seed(tokens))


def rows(tokens: int, experts: list[int], top_k: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, ids (distinct within a token, some of them -1), weights."""
    generator = torch.Generator().manual_seed(tokens)
    held = torch.tensor(experts, dtype=torch.int32)
    ids = torch.stack([held[torch.randperm(len(held), generator=generator)[:top_k]] for _ in range(tokens)])
    ids[torch.rand(ids.shape, generator=generator) < 0.25] = -1
    return torch.randn(tokens, HIDDEN, generator=generator), ids, torch.rand(ids.shape, generator=generator)


@pytest.mark.parametrize("tokens", [1, 2, 7, 64])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("bfloat16", 6e-3), ("float16", 2e-3), ("int8", 4e-2)])
def test_matches_the_reference(checkpoint: Path, tokens: int, dtype: str, bound: float) -> None:
    experts = [59, 0, 3, 4, 5, 17, 31, 40]
    hidden_TH, ids_TK, weights_TK = rows(tokens, experts)
    out_TH = compute_of(checkpoint, experts, dtype).forward(2, hidden_TH, ids_TK, weights_TK)
    exact_TH = reference(checkpoint, 2, hidden_TH, ids_TK, weights_TK)
    assert (out_TH - exact_TH).norm() <= bound * exact_TH.norm()


def test_shares_of_several_workers_add_up(checkpoint: Path) -> None:
    hidden_TH, ids_TK, weights_TK = rows(9, list(range(EXPERTS)))
    whole_TH = compute_of(checkpoint, list(range(EXPERTS))).forward(1, hidden_TH, ids_TK, weights_TK)
    parts_TH = torch.zeros_like(whole_TH)
    for worker in range(7):
        mine = list(range(worker, EXPERTS, 7))
        here = torch.isin(ids_TK, torch.tensor(mine, dtype=torch.int32))
        parts_TH += compute_of(checkpoint, mine).forward(1, hidden_TH, ids_TK.masked_fill(~here, -1), weights_TK)
    assert torch.allclose(parts_TH, whole_TH, rtol=1e-5, atol=1e-5)


def test_entries_without_an_expert_add_nothing(checkpoint: Path) -> None:
    compute = compute_of(checkpoint, [3, 4])
    hidden_TH, weights_TK = some_hidden(3), torch.full((3, 2), torch.nan)
    ids_TK = torch.full((3, 2), -1, dtype=torch.int32)
    assert torch.equal(compute.forward(1, hidden_TH, ids_TK, weights_TK), torch.zeros(3, HIDDEN))
    ids_TK[1, 1], weights_TK[1, 1] = 4, 1.0
    out_TH = compute.forward(1, hidden_TH, ids_TK, weights_TK)
    assert torch.equal(out_TH[[0, 2]], torch.zeros(2, HIDDEN))
    assert out_TH[1].abs().max() > 0.01


def test_no_tokens(checkpoint: Path) -> None:
    compute = compute_of(checkpoint, [3])
    for top_k in (0, 4):
        ids_TK = torch.empty(0, top_k, dtype=torch.int32)
        out = compute.forward(1, torch.empty(0, HIDDEN), ids_TK, torch.empty(0, top_k))
        assert out.shape == (0, HIDDEN)


def test_a_repeat_gives_the_same_bits(checkpoint: Path) -> None:
    experts = list(range(20))
    compute, (hidden_TH, ids_TK, weights_TK) = compute_of(checkpoint, experts), rows(33, experts)
    first = compute.forward(1, hidden_TH, ids_TK, weights_TK)
    assert torch.equal(compute.forward(1, hidden_TH, ids_TK, weights_TK), first)


def test_the_order_of_a_tokens_experts_does_not_matter(checkpoint: Path) -> None:
    experts = list(range(20))
    compute, (hidden_TH, ids_TK, weights_TK) = compute_of(checkpoint, experts), rows(1, experts)
    turned = compute.forward(1, hidden_TH, ids_TK.flip(1), weights_TK.flip(1))
    assert torch.equal(turned, compute.forward(1, hidden_TH, ids_TK, weights_TK))


def test_a_token_does_not_depend_on_its_batch(checkpoint: Path) -> None:
    """float32, one thread. Bit for bit where the machine's own GEMM is stable from 16 rows on (MKL on AVX-512 is)."""
    experts = list(range(20))
    compute, (hidden_TH, ids_TK, weights_TK) = compute_of(checkpoint, experts), rows(64, experts)
    together_TH = compute.forward(1, hidden_TH, ids_TK, weights_TK)
    one = [slice(t, t + 1) for t in range(64)]
    alone_TH = torch.cat([compute.forward(1, hidden_TH[t], ids_TK[t], weights_TK[t]) for t in one])
    weight = some_hidden(HIDDEN)
    stable = torch.equal((hidden_TH @ weight)[:16], hidden_TH[:16] @ weight)
    bound = 0 if stable else 2e-6 * float(together_TH.abs().max())
    assert float((alone_TH - together_TH).abs().max()) <= bound


def test_hidden_states_of_another_dtype(checkpoint: Path) -> None:
    compute, (hidden_TH, ids_TK, weights_TK) = compute_of(checkpoint, list(range(9))), rows(5, list(range(9)))
    hidden_TH = hidden_TH.to(torch.bfloat16)
    out_TH = compute.forward(1, hidden_TH, ids_TK, weights_TK)
    assert torch.equal(out_TH, compute.forward(1, hidden_TH.float(), ids_TK, weights_TK))


def test_an_unknown_layer(checkpoint: Path) -> None:
    with pytest.raises(StalePlacement, match=r"layer 0 is not held by .* layers 1-2") as caught:
        compute_of(checkpoint, [1]).forward(0, *rows(1, [1], top_k=1))
    assert caught.value.experts == (1,)


def test_an_expert_that_is_not_held(checkpoint: Path) -> None:
    ids_TK = torch.tensor([[9, -1], [3, 8]], dtype=torch.int32)
    with pytest.raises(StalePlacement, match=r"layer 2: expert\(s\) 8, 9 not held by this worker") as caught:
        compute_of(checkpoint, [3, 4]).forward(2, some_hidden(2), ids_TK, torch.ones(2, 2))
    assert caught.value.experts == (8, 9)


@pytest.mark.parametrize("bad", [60, -2, 2**31 - 1])
def test_an_id_that_the_model_does_not_have(checkpoint: Path, bad: int) -> None:
    ids_TK = torch.tensor([[3, bad]], dtype=torch.int32)
    with pytest.raises(FrameError, match="expert ids must be from -1 to 59"):
        compute_of(checkpoint, [3, 4]).forward(2, some_hidden(1), ids_TK, torch.ones(1, 2))


def test_shapes_that_do_not_fit(checkpoint: Path) -> None:
    compute, ids_TK = compute_of(checkpoint, [3]), torch.tensor([[3]], dtype=torch.int32)
    with pytest.raises(FrameError, match=r"hidden states are \[1, 64\], not \[tokens, 128\]"):
        compute.forward(1, some_hidden(1, 64), ids_TK, torch.ones(1, 1))
    with pytest.raises(FrameError, match=r"expert ids \[1, 1\] and weights \[1, 2\] do not fit 1 tokens"):
        compute.forward(1, some_hidden(1), ids_TK, torch.ones(1, 2))
    with pytest.raises(FrameError, match="do not fit 2 tokens"):
        compute.forward(1, some_hidden(2), ids_TK, torch.ones(1, 1))
