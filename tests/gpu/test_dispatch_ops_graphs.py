"""An attention half in pieces, each a CUDA graph, around the two operators of the dispatch: the same bits as without
graphs, at addresses that stay, with a real client and a real server of experts on the GPU between them.

The pieces are what vLLM's piecewise graphs are: captured once at fixed addresses, replayed for each step; the operators
run between two replays and see the same tensors each time.

Legend: T rows, H hidden size, K experts per row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from cluster.config import DispatchConfig
from deployments.attention.dispatch_ops import RemoteLayer, connect
from deployments.attention.pinned_rows import PinnedRows
from deployments.experts.compute import ExpertCompute
from deployments.experts.forms import Form
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.placement import PlacementFile, PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.server import ExpertServer
from tests.gpu.layers import BOUNDS, LAYER, GpuExperts, gpu_experts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and this machine has none")

HIDDEN, CAPTURED_ROWS, TOP_K, LAYERS = 256, 32, 3, 3
EXPERTS_LAYER = LAYER  # every layer of the toy has the same routed experts
SETTINGS = DispatchConfig()


class Step:
    """How many rows of a forward are requests'; the others pad it to what was captured."""

    rows = CAPTURED_ROWS

    def __call__(self, rows: int) -> int:
        return min(rows, self.rows)


@pytest.fixture(scope="module")
def experts() -> GpuExperts:
    return gpu_experts(Form.GROUPED_FP8, HIDDEN)


@pytest.fixture
def step(experts: GpuExperts, tmp_path: Path) -> Iterator[Step]:
    """The operators' layers, connected through gRPC on loopback to experts on this GPU."""
    server = ExpertServer(ExpertCompute(experts.weights, 1).forward, HIDDEN, "toy", SETTINGS)
    worker = WorkerEndpoint("worker", server.start("127.0.0.1"), {EXPERTS_LAYER: experts.layer.ids})
    placement = PlacementFile(tmp_path / "placement")
    placement.write(PlacementTable.of(Stamp(1, 1), (worker,)))
    shape = ExpertShape("toy", HIDDEN, experts.num_experts)
    client = ExpertClient(SETTINGS, shape, placement, torch.bfloat16, torch.bfloat16)
    step, pinned = Step(), PinnedRows()
    for layer in range(LAYERS):
        connect(f"toy.{layer}", RemoteLayer(EXPERTS_LAYER, client, step, pinned))
    yield step
    client.close()
    server.stop(0)


class Attention:
    """What is around the operators: functions of tensors alone."""

    def __init__(self, experts: GpuExperts) -> None:
        generator = torch.Generator("cuda").manual_seed(1)

        def random(columns: int) -> torch.Tensor:
            weight = torch.randn(LAYERS, HIDDEN, columns, generator=generator, device="cuda")
            return (weight / HIDDEN**0.5).bfloat16()

        self._mix, self._gate, self._shared = random(HIDDEN), random(len(experts.layer.ids)), random(HIDDEN)
        self._first = experts.layer.ids[0]

    def before(self, layer: int, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_TH = functional.silu(x_TH @ self._mix[layer])
        chosen = (hidden_TH @ self._gate[layer]).float().softmax(1).topk(TOP_K)
        return hidden_TH, chosen.values, (chosen.indices + self._first).int()

    def shared(self, layer: int, hidden_TH: torch.Tensor) -> torch.Tensor:
        return functional.silu(hidden_TH @ self._shared[layer])

    def after(self, x_TH: torch.Tensor, routed_TH: torch.Tensor, shared_TH: torch.Tensor) -> torch.Tensor:
        return x_TH + routed_TH + shared_TH


class Graph:
    """One piece, captured with its arguments' addresses; `output` has an address of its own for good."""

    def __init__(self, function: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()  # libraries allocate their workspaces outside of a capture
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.output = function()
        self.replay = self._graph.replay


def without_graphs(attention: Attention, x_TH: torch.Tensor) -> torch.Tensor:
    for layer in range(LAYERS):
        hidden_TH, weights_TK, ids_TK = attention.before(layer, x_TH)
        torch.ops.deepsplit.dispatch(hidden_TH, weights_TK, ids_TK, f"toy.{layer}")
        shared_TH, routed_TH = attention.shared(layer, hidden_TH), torch.empty_like(hidden_TH)
        torch.ops.deepsplit.collect(routed_TH, hidden_TH, shared_TH, f"toy.{layer}")
        x_TH = attention.after(x_TH, routed_TH, shared_TH)
    return x_TH


class WithGraphs:
    """The same, with every piece between the operators captured."""

    def __init__(self, attention: Attention) -> None:
        self.x_TH = x_TH = torch.zeros(CAPTURED_ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.steps: list[Callable[[], object]] = []
        self.routed: list[torch.Tensor] = []
        for layer in range(LAYERS):
            before = Graph(lambda layer=layer, x_TH=x_TH: attention.before(layer, x_TH))
            hidden_TH, weights_TK, ids_TK = before.output
            shared = Graph(lambda layer=layer, hidden_TH=hidden_TH: attention.shared(layer, hidden_TH))
            routed_TH = torch.empty_like(hidden_TH)
            after = Graph(lambda x_TH=x_TH, of=(routed_TH, shared.output): attention.after(x_TH, *of))
            sent, got = (hidden_TH, weights_TK, ids_TK), (routed_TH, hidden_TH, shared.output)
            self.steps += [
                before.replay,
                lambda sent=sent, layer=layer: torch.ops.deepsplit.dispatch(*sent, f"toy.{layer}"),
                shared.replay,
                lambda got=got, layer=layer: torch.ops.deepsplit.collect(*got, f"toy.{layer}"),
                after.replay,
            ]
            self.routed.append(routed_TH)
            x_TH = after.output
        self.out_TH = x_TH

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        self.x_TH[: len(x_TH)] = x_TH
        for step in self.steps:
            step()
        return self.out_TH[: len(x_TH)]


@torch.inference_mode()
def test_graphs_change_no_bit_and_no_address(experts: GpuExperts, step: Step) -> None:
    attention = Attention(experts)
    graphs = WithGraphs(attention)
    addresses = [routed_TH.data_ptr() for routed_TH in graphs.routed]
    seen = []
    for number, rows in enumerate((CAPTURED_ROWS, 5, CAPTURED_ROWS, 1, 17)):
        x_TH = torch.randn(CAPTURED_ROWS, HIDDEN, generator=torch.Generator().manual_seed(number)).bfloat16().cuda()
        step.rows = rows
        plain_TH, replayed_TH = without_graphs(attention, x_TH), graphs(x_TH)
        assert torch.equal(replayed_TH[:rows], plain_TH[:rows])
        assert [routed_TH.data_ptr() for routed_TH in graphs.routed] == addresses
        assert not graphs.routed[0][rows:].any()  # rows that pad the step were not sent
        seen.append(replayed_TH[0].clone())
    assert not torch.equal(seen[0], seen[2])  # other inputs, other outputs: nothing was left from a step before


@torch.inference_mode()
def test_what_comes_back_is_what_the_experts_compute(experts: GpuExperts, step: Step) -> None:
    attention = Attention(experts)
    hidden_TH, weights_TK, ids_TK = attention.before(0, torch.randn(9, HIDDEN).bfloat16().cuda())
    routed_TH = torch.full_like(hidden_TH, torch.nan)
    torch.ops.deepsplit.dispatch(hidden_TH, weights_TK, ids_TK, "toy.0")
    torch.ops.deepsplit.collect(routed_TH, hidden_TH, None, "toy.0")
    exact_TH = experts.exact(hidden_TH.cpu(), ids_TK.cpu(), weights_TK.cpu())
    assert (routed_TH.cpu().double() - exact_TH).norm() < BOUNDS[Form.GROUPED_FP8] * exact_TH.norm()
