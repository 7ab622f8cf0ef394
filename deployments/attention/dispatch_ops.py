"""The dispatch to expert workers as two opaque operators, `deepsplit::dispatch` and `deepsplit::collect`.

A compiler (torch.compile, or vLLM when it cuts a model into CUDA graphs) sees two calls that it must not look into, and
orders everything else around them by what they claim to read and write:

- `dispatch` claims to write `hidden_TH`, so the shared expert, which reads it, runs after the rows were sent.
- `collect` reads the shared expert's output, so it waits for the replies after that. It writes into a tensor that its
  caller allocated: a CUDA graph that reads the tensor later finds it at the address that was captured.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from deployments.attention.pinned_rows import PinnedRows
from routing.tokens.client import ExpertClient
from routing.tokens.in_flight import Dispatch

_LIBRARY = torch.library.Library("deepsplit", "DEF")  # ops live as long as their library object


class RemoteLayer:
    """One MoE layer's way to its experts. Tensor-parallel ranks hold the same rows: each sends its share of them, and
    vLLM sums the ranks' outputs.
    """

    def __init__(
        self,
        index: int,
        client: ExpertClient,
        rows_of_requests: Callable[[int], int],
        pinned: PinnedRows,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """`rows_of_requests(rows)`: how many rows of the present forward are to be sent, from the first on. `pinned`:
        the client's buffers, for rows that are on a GPU; its layers share them.
        """
        self.index = index
        self.client = client
        self._rows_of_requests, self._pinned = rows_of_requests, pinned
        self._rank, self._ranks = rank, ranks
        self._begun = _Begun()  # each micro-batch of vLLM has a thread of its own

    def dispatch(self, hidden_TH: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor) -> None:
        """Send this rank's share of the rows."""
        rows = share_of(self._rows_of_requests(len(hidden_TH)), self._rank, self._ranks)
        self._begun.rows = rows
        if self._begun.dispatch is not None:  # the step before this one failed between its two operators
            self.client.abandon(self._begun.dispatch)
            self._begun.dispatch = None
        if rows.stop > rows.start:
            sent = hidden_TH[rows], topk_ids_TK[rows], topk_weights_TK[rows]
            if hidden_TH.is_cuda:
                sent = self._pinned.to_host(*sent)
            self._begun.dispatch = self.client.begin(self.index, *sent)

    def collect(self, output_TH: torch.Tensor) -> None:
        """Write the weighted sums of the rows that `dispatch` sent, and zeros for the others."""
        begun, rows, self._begun.dispatch = self._begun.dispatch, self._begun.rows, None
        if rows.stop - rows.start < len(output_TH):
            output_TH.zero_()
        if begun is not None:
            output_RH = self.client.finish(begun)
            if output_TH.is_cuda:
                self._pinned.to_gpu(output_RH, output_TH[rows])
            else:
                output_TH[rows] = output_RH


class _Begun(threading.local):
    """What is between its two operators on this thread."""

    def __init__(self) -> None:
        self.dispatch: Dispatch | None = None
        self.rows = slice(0, 0)


def share_of(rows: int, rank: int, ranks: int) -> slice:
    """Return the rows that `rank` of `ranks` sends: equal shares of consecutive rows, as near as can be."""
    return slice(rows * rank // ranks, rows * (rank + 1) // ranks)


_layers: dict[str, RemoteLayer] = {}  # by vLLM's name of the layer: operators take no objects


def connect(name: str, layer: RemoteLayer) -> None:
    """From now on the operators for the layer that vLLM calls `name` go through `layer`."""
    _layers[name] = layer


def connected(name: str) -> RemoteLayer:
    """Return what the operators for the layer that vLLM calls `name` go through."""
    return _layers[name]


def _dispatch(
    hidden_TH: torch.Tensor, topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, layer_name: str
) -> None:
    connected(layer_name).dispatch(hidden_TH, topk_weights_TK, topk_ids_TK)


def _collect(
    output_TH: torch.Tensor, hidden_TH: torch.Tensor, shared_TH: torch.Tensor | None, layer_name: str
) -> None:
    connected(layer_name).collect(output_TH)


def _define() -> None:
    schemas = {
        "dispatch": "(Tensor(a!) hidden_TH, Tensor topk_weights_TK, Tensor topk_ids_TK, str layer_name) -> ()",
        "collect": "(Tensor(a!) output_TH, Tensor hidden_TH, Tensor? shared_TH, str layer_name) -> ()",
    }
    for (name, schema), run in zip(schemas.items(), (_dispatch, _collect), strict=True):
        _LIBRARY.define(name + schema)
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, run, device)
        torch.library.register_fake(f"deepsplit::{name}", lambda *_: None, lib=_LIBRARY)


_define()
