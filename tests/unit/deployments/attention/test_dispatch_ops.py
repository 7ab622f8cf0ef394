"""The two operators of the dispatch: what a compiler makes of them, and whose rows they send."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from deployments.attention import dispatch_ops, forward_rows
from deployments.attention.dispatch_ops import RemoteLayer, connect, share_of
from deployments.attention.engine_args import REMOTE_OPS
from deployments.attention.forward_rows import rows_of_requests
from deployments.attention.pinned_rows import PinnedRows

ROWS, HIDDEN, TOP_K = 5, 8, 2


class Experts:
    """In place of ExpertClient: one expert that doubles; notes the order of calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.abandoned: list[torch.Tensor] = []

    def begin(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        assert len(hidden_TH) == len(expert_ids_TK) == len(weights_TK)
        self.calls.append(f"begin {layer}: {len(hidden_TH)} rows")
        return hidden_TH * 2

    def finish(self, begun: torch.Tensor) -> torch.Tensor:
        self.calls.append("finish")
        return begun

    def abandon(self, begun: torch.Tensor) -> None:
        self.abandoned.append(begun)


def step(monkeypatch: pytest.MonkeyPatch, rows_of_requests: int | None) -> None:
    """From now on a forward has so many rows of requests; None: it is vLLM's own, for profiling."""
    metadata = {} if rows_of_requests is None else {"attn": SimpleNamespace(num_actual_tokens=rows_of_requests)}
    monkeypatch.setattr(forward_rows, "get_forward_context", lambda: SimpleNamespace(attn_metadata=metadata))


def layer_of(experts: Experts, rank: int = 0, ranks: int = 1) -> RemoteLayer:
    return RemoteLayer(3, experts, rows_of_requests, PinnedRows(), rank, ranks)  # type: ignore[arg-type]


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Experts]:
    experts = Experts()
    monkeypatch.setattr(dispatch_ops, "_layers", {})
    connect("model.layers.3", layer_of(experts))
    step(monkeypatch, ROWS)
    return experts


def routed(rows: int = ROWS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden_TH = torch.randint(-9, 9, (rows, HIDDEN)).float()  # sums without rounding
    return hidden_TH, torch.rand(rows, TOP_K), torch.zeros(rows, TOP_K, dtype=torch.int32)


def moe(shared: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    def layer(hidden_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        hidden_TH = hidden_TH * 1.0
        torch.ops.deepsplit.dispatch(hidden_TH, weights_TK, ids_TK, "model.layers.3")
        shared_TH = shared(hidden_TH)
        output_TH = torch.empty_like(hidden_TH)
        torch.ops.deepsplit.collect(output_TH, hidden_TH, shared_TH, "model.layers.3")
        return output_TH + shared_TH

    return layer


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_keeps_the_shared_expert_between_the_two(experts: Experts, backend: str) -> None:
    @torch.library.custom_op("deepsplit_test::shared", mutates_args=())
    def shared(x: torch.Tensor) -> torch.Tensor:
        experts.calls.append("shared")
        return x + 1

    shared.register_fake(torch.empty_like)
    compiled = torch.compile(moe(shared), backend=backend, fullgraph=True)
    inputs = routed()
    given = inputs[0].clone()
    assert torch.equal(compiled(*inputs), given * 2 + given + 1)
    assert experts.calls == [f"begin 3: {ROWS} rows", "shared", "finish"]
    assert torch.equal(inputs[0], given)  # `dispatch` only claims to write


def test_the_operators_are_what_they_say_to_compilers(experts: Experts) -> None:
    hidden_TH, weights_TK, ids_TK = routed()
    for name in REMOTE_OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    torch.library.opcheck(
        torch.ops.deepsplit.dispatch.default,
        (hidden_TH, weights_TK, ids_TK, "model.layers.3"),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert experts.abandoned  # opcheck calls it again and again without `collect`


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 64])
def test_ranks_share_all_rows(rows: int, ranks: int) -> None:
    shares = [share_of(rows, rank, ranks) for rank in range(ranks)]
    assert [row for share in shares for row in range(rows)[share]] == list(range(rows))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks", [2, 8])
def test_the_ranks_outputs_add_up(experts: Experts, ranks: int) -> None:
    hidden_TH, weights_TK, ids_TK = routed()
    total_TH = torch.zeros_like(hidden_TH)
    for rank in range(ranks):
        connect("model.layers.3", layer_of(experts, rank, ranks))
        total_TH += moe(torch.zeros_like)(hidden_TH, weights_TK, ids_TK)
    assert torch.equal(total_TH, hidden_TH * 2)
    assert len(experts.calls) == 2 * min(ranks, ROWS)  # a rank without rows sends nothing


def test_rows_that_pad_a_step_stay_here(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    step(monkeypatch, 3)
    hidden_TH, weights_TK, ids_TK = routed()
    output_TH = moe(torch.zeros_like)(hidden_TH, weights_TK, ids_TK)
    assert experts.calls == ["begin 3: 3 rows", "finish"]
    assert torch.equal(output_TH[:3], hidden_TH[:3] * 2)
    assert not output_TH[3:].any()


def test_a_run_without_requests_sends_nothing(experts: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    step(monkeypatch, None)
    assert not moe(torch.zeros_like)(*routed()).any()
    assert experts.calls == []


def test_a_step_that_failed_between_the_two_is_given_up_by_the_next(experts: Experts) -> None:
    def broken(hidden_TH: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        moe(broken)(*routed())
    hidden_TH, weights_TK, ids_TK = routed(2)
    assert torch.equal(moe(torch.zeros_like)(hidden_TH, weights_TK, ids_TK), hidden_TH * 2)
    assert [len(begun) for begun in experts.abandoned] == [ROWS]
