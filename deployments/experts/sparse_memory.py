"""Tensors of more experts than a worker holds: memory is there only for those that were written.

An expert has the same place, its number, whether it is held or not, so it can be loaded and dropped while others are
computed, and no index changes. Linux gives a page when it is first written, and takes it back when told to.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch

_MAP_NORESERVE = 0x4000  # Linux; Python 3.11 has no name for it
_HUGE_PAGE_BYTES = 2 << 20


class SparseStack:
    """A tensor [N, ...] whose N parts come and go. Raises OSError where the system reserves what is only mapped
    (vm.overcommit_memory 2, or a limit of the address space).
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._part_bytes = math.prod(shape[1:]) * dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._memory = mmap.mmap(-1, max(1, shape[0] * self._part_bytes), flags=flags)
        if self._part_bytes >= _HUGE_PAGE_BYTES:  # or one part would have the memory of many
            self._memory.madvise(mmap.MADV_HUGEPAGE)  # a GEMM is 4-10 % faster with them
        self.tensor = torch.frombuffer(self._memory, dtype=dtype, count=math.prod(shape)).view(*shape)

    def release(self, part: int) -> None:
        """Give back a part's memory, as far as it is whole pages; what was in it is lost."""
        begin, end = (at * self._part_bytes for at in (part, part + 1))
        begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if begin < end:
            self._memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)
