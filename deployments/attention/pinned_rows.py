"""Rows between a GPU and the dispatch's client: through pinned memory, with one wait for all tensors of a dispatch.

The copies run on the stream of the forward. One of their own would win nothing: what is copied out was just computed,
the CPU must have it before it sends, and what is copied in is read by the next kernel.

Legend: R rows, H hidden size, K experts per row.
"""

from __future__ import annotations

import threading

import torch


class PinnedRows(threading.local):
    """Buffers of one client, each thread's own; they grow to the longest dispatch. A thread has one dispatch at a time,
    whose client reads the buffers until it is finished.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def to_host(
        self, hidden_RH: torch.Tensor, ids_RK: torch.Tensor, weights_RK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return copies on the CPU, valid until this thread's next call."""
        copies = (self._like("hidden", hidden_RH), self._like("ids", ids_RK), self._like("weights", weights_RK))
        for copy, tensor in zip(copies, (hidden_RH, ids_RK, weights_RK), strict=True):
            copy.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return copies

    def to_gpu(self, rows_RH: torch.Tensor, out_RH: torch.Tensor) -> None:
        """Begin to copy `rows_RH` into `out_RH`, which is on the GPU."""
        copy_RH = self._like("back", rows_RH)
        # Free: the wait of the dispatch that these rows answer came after the last copy from here.
        copy_RH.copy_(rows_RH)
        out_RH.copy_(copy_RH, non_blocking=True)

    def _like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if (
            buffer is None
            or buffer.dtype != tensor.dtype
            or buffer.shape[1:] != tensor.shape[1:]
            or len(buffer) < len(tensor)
        ):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._buffers[name] = buffer
        return buffer[: len(tensor)]
