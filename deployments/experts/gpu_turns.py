"""A turn's way through a GPU: pinned buffers, a stream for each direction of the copies and one for the kernels.

A turn goes in chunks: while one is computed, the next is copied in and the one before it copied out. Every buffer is
allocated once and has its size from the chunk, so addresses stay and a turn of any length takes the same memory of the
GPU. Only the host's output grows with the longest turn.

Legend: T rows (tokens), H hidden size, I intermediate size, P pairs of row and held expert, N held experts.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from deployments.experts.forms import Form
from deployments.experts.grouped_gemm import (
    BFLOAT16_LAUNCHES,
    FP8_LAUNCHES,
    Launch,
    Scratch,
    SortedPairs,
    weighted_sums,
)
from deployments.experts.kernels import Pairs
from deployments.experts.turn_layout import TILE_WORDS, Sections, lay_out, words_for
from deployments.experts.weights import LayerExperts

CHUNK_ROWS, CHUNK_PAIRS = 1024, 8192
_SLOTS = 2
_ROOM = 1.5  # of a tile over an expert's mean rows: some have more, and a second tile reads the weight again


def chunks(pairs: Pairs, rows: int, experts_per_row: int) -> Iterator[tuple[int, int, Pairs]]:
    """Yield each chunk's first row, number of rows, and pairs, whose tokens count from that row."""
    step = max(1, min(CHUNK_ROWS, CHUNK_PAIRS // experts_per_row))
    for first in range(0, rows, step):
        count = min(step, rows - first)
        begin, end = np.searchsorted(pairs.tokens_P, (first, first + count))
        yield first, count, Pairs(pairs.tokens_P[begin:end] - first, pairs.local_P[begin:end], pairs.scale_P[begin:end])


class _Slot:
    """The buffers of one chunk on both sides, and the events after which they are free again."""

    def __init__(self, hidden: int, words: int) -> None:
        self.rows_TH = torch.empty(CHUNK_ROWS, hidden, dtype=torch.bfloat16, pin_memory=True)
        self.words = torch.empty(words, dtype=torch.int32, pin_memory=True)
        self.on_gpu_rows_TH = torch.empty_like(self.rows_TH, device="cuda")
        self.on_gpu_words = torch.empty_like(self.words, device="cuda")
        self.on_gpu_out_TH = torch.empty_like(self.on_gpu_rows_TH)
        self.copied, self.computed, self.returned = (torch.cuda.Event() for _ in range(3))


class GpuTurns:
    """Computes turns on the current GPU. Not thread-safe."""

    def __init__(self, form: Form, hidden: int, inner: int, most_held: int) -> None:
        """`most_held`: experts of the layer that has most."""
        self._launches = FP8_LAUNCHES if form is Form.GROUPED_FP8 else BFLOAT16_LAUNCHES
        self.words = words_for(CHUNK_ROWS, CHUNK_PAIRS, most_held, self._launches[0].rows)  # of a chunk's layout
        self._slots = [_Slot(hidden, self.words) for _ in range(_SLOTS)]
        self._scratch = Scratch(CHUNK_ROWS, CHUNK_PAIRS, hidden, inner, form is Form.GROUPED_FP8)
        self._out_TH = torch.empty(CHUNK_ROWS, hidden, dtype=torch.bfloat16, pin_memory=True)
        self._in, self._kernels, self._back = (torch.cuda.Stream() for _ in range(3))
        # The allocator knows nothing of these streams: what it gave may still be used by work queued on another.
        torch.cuda.synchronize()

    def compile(self, experts: LayerExperts) -> None:
        """Have every kernel compiled, or loaded from Triton's cache, before the first request needs it."""
        hidden_TH = torch.zeros(1, experts.hidden_size, dtype=torch.bfloat16)
        pairs = Pairs(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.float32))
        with torch.cuda.stream(self._kernels):
            for launch in self._launches:
                self._run(experts, hidden_TH, pairs, 0, launch, self._slots[0])
        torch.cuda.synchronize()

    def forward(
        self, experts: LayerExperts, hidden_TH: torch.Tensor, pairs: Pairs, experts_per_row: int
    ) -> torch.Tensor:
        """sum over pairs of scale x expert(hidden): bfloat16 [T, H] in pinned memory, valid until the next call.

        `hidden_TH` is on the CPU, of any floating dtype. Waits once, for the last copy back.
        """
        rows = len(hidden_TH)
        if rows > len(self._out_TH):
            self._out_TH = torch.empty(rows, hidden_TH.shape[1], dtype=torch.bfloat16, pin_memory=True)
        with torch.cuda.stream(self._kernels):
            for number, (first, count, chunk) in enumerate(chunks(pairs, rows, experts_per_row)):
                slot = self._slots[number % _SLOTS]
                self._run(experts, hidden_TH[first : first + count], chunk, first, None, slot)
        slot.returned.synchronize()  # chunks come back in their order
        return self._out_TH[:rows]

    def launch(self, counts_N: np.ndarray) -> Launch:
        """Return the smallest tile that has room for the mean rows of an expert that is met, or the largest."""
        rows = _ROOM * counts_N.sum() / max(1, np.count_nonzero(counts_N))
        return next((launch for launch in self._launches if rows <= launch.rows), self._launches[-1])

    def _run(
        self,
        experts: LayerExperts,
        hidden_TH: torch.Tensor,
        pairs: Pairs,
        first: int,
        launch: Launch | None,
        slot: _Slot,
    ) -> None:
        rows = len(hidden_TH)
        counts_N = np.bincount(pairs.local_P, minlength=len(experts.ids))
        launch = launch or self.launch(counts_N)
        slot.copied.synchronize()  # the pinned buffers of the slot's last chunk
        sections = lay_out(slot.words.numpy(), pairs, rows, counts_N, launch.rows)
        slot.rows_TH[:rows] = hidden_TH
        # `set_stream`: a context for each stream would take a tenth of a decode step's time on the CPU.
        torch.cuda.set_stream(self._in)
        self._in.wait_event(slot.computed)
        slot.on_gpu_words[: sections.end].copy_(slot.words[: sections.end], non_blocking=True)
        slot.on_gpu_rows_TH[:rows].copy_(slot.rows_TH[:rows], non_blocking=True)
        slot.copied.record(self._in)
        torch.cuda.set_stream(self._kernels)
        self._kernels.wait_event(slot.copied)
        self._kernels.wait_event(slot.returned)
        self.compute(experts, slot.on_gpu_rows_TH[:rows], slot.on_gpu_words, sections, launch, slot.on_gpu_out_TH)
        slot.computed.record(self._kernels)
        torch.cuda.set_stream(self._back)
        self._back.wait_event(slot.computed)
        self._out_TH[first : first + rows].copy_(slot.on_gpu_out_TH[:rows], non_blocking=True)
        slot.returned.record(self._back)

    def compute(
        self,
        experts: LayerExperts,
        hidden_TH: torch.Tensor,
        words: torch.Tensor,
        sections: Sections,
        launch: Launch,
        out_TH: torch.Tensor,
    ) -> None:
        """Run the kernels of one chunk on the current stream; everything is on the GPU."""
        pairs = SortedPairs(
            words[sections.row_P],
            words[sections.place_P],
            words[sections.weight_P].view(torch.float32),
            words[sections.first_T],
            words[sections.tiles].view(-1, TILE_WORDS),
        )
        scales = None
        if experts.gate_up_scale is not None and experts.down_scale is not None:
            scales = (experts.gate_up_scale, experts.down_scale)
        weighted_sums(experts.gate_up, experts.down, scales, hidden_TH, pairs, launch, self._scratch, out_TH)


