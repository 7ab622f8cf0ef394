"""Reads a worker's share of the routed experts from safetensors shards into the form that computes.

Several threads take one expert at a time (deployments/experts/sources.py), and of that a strip of rows at a time: the
strip is read (`preadv`) into a buffer that stays in the processor's cache, and packed from there to its place. Where
the form is the stored one, rows are read straight into place. Memory peaks at the final weights and a few MiB per
thread.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import CheckpointError
from cluster.model.checkpoint import CheckpointIndex, ExpertTensor, TensorEntry, read_entries
from cluster.model.spec import ModelSpec
from deployments.experts.forms import Form
from deployments.experts.packing import BLOCK_ROWS
from deployments.experts.sources import Peer, Source, Wanted, load_all
from deployments.experts.storing import put_rows, scale_place, store
from deployments.experts.weights import DTYPES, FP8, PACKED, ExpertWeights, LayerExperts, bytes_of, empty_layer
from deployments.hosting.fp8_blocks import dequantise

_FILE_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
# Two at least, so that one packs while another waits for the disk, even on a single core; more than eight wait for the
# same disk or memory.
_LEAST_THREADS, _MOST_THREADS = 2, 8
_STRIP_BYTES = 1 << 19  # of the file

OnProgress = Callable[[int, int], None]


def load_experts(
    index: CheckpointIndex,
    spec: ModelSpec,
    assignment: Mapping[int, Sequence[int]],
    form: Form,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
) -> ExpertWeights:
    """Return the experts of `assignment` (global ids by layer) in `form`, which `choose_form` has found possible.

    `on_progress(done_bytes, total_bytes)`, in memory, is called after each expert, by one thread at a time. Opens only
    the shards that it needs. Raises CheckpointError if a tensor is missing or of a wrong shape or dtype, or a shard is
    missing or truncated.
    """
    layers = {layer: empty_layer(spec, tuple(sorted(assignment[layer])), form, device) for layer in sorted(assignment)}
    loaded = fill_layers(index, spec, layers, assignment, on_progress)
    return ExpertWeights(layers, spec.num_experts, loaded.bytes_read)


@dataclass(frozen=True)
class Loaded:
    """Where experts came from."""

    bytes_read: int  # from the shards, their headers left out
    from_peers: int  # experts


def fill_layers(
    index: CheckpointIndex,
    spec: ModelSpec,
    layers: Mapping[int, LayerExperts],
    share: Mapping[int, Sequence[int]],
    on_progress: OnProgress | None = None,
    peers: Sequence[Peer] = (),
) -> Loaded:
    """Load a share of the experts (global ids by layer) into their places in `layers`, as `load_experts` does, and from
    `peers` too.
    """
    wanted = []
    for number, ids in share.items():
        place = {expert: local for local, expert in enumerate(layers[number].ids)}
        wanted += [Wanted(number, expert, layers[number], place[expert]) for expert in ids]
    total, done, from_peers = sum(one.experts.expert_bytes for one in wanted), 0, 0

    def on_loaded(one: Wanted, source: Source) -> None:
        nonlocal done, from_peers
        done += one.experts.expert_bytes
        from_peers += source is not disk
        if on_progress is not None:
            on_progress(done, total)

    threads = torch.get_num_threads()
    with _Disk(index, spec, wanted) as disk:
        try:
            load_all(disk.ordered, [disk, *peers], on_loaded)
        finally:
            torch.set_num_threads(threads)  # for threads that are still to begin; the sources' had one each
    return Loaded(disk.bytes_read, from_peers)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a projection, and where it is in its shard."""

    name: ExpertTensor
    entry: TensorEntry
    scale: tuple[ExpertTensor, TensorEntry] | None  # of FP8

    @property
    def nbytes(self) -> int:
        return sum(entry.end - entry.begin for entry in (self.entry, *(self.scale[1:] if self.scale else ())))


@dataclass(frozen=True)
class _Job:
    """One expert: its place, and its projections gate, up, down."""

    layer: LayerExperts
    local: int
    tensors: tuple[_Tensor, _Tensor, _Tensor]


class _Disk:
    """The checkpoint as a source. A context manager, which closes its files."""

    name, from_end = "the checkpoint", False

    def __init__(self, index: CheckpointIndex, spec: ModelSpec, wanted: Iterable[Wanted]) -> None:
        """Reads the headers of the shards that `wanted` needs. What is wrong with one expert there is told by
        `why_not`.
        """
        self._index, self._spec = index, spec
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()  # of `_files` and `bytes_read`
        self._buffers = threading.local()
        self.bytes_read = 0
        self.threads = max(_LEAST_THREADS, min(_MOST_THREADS, len(os.sched_getaffinity(0))))
        self._jobs: dict[Wanted, _Job | CheckpointError] = {}
        for one in wanted:
            try:
                self._jobs[one] = self._job(one.experts, one.layer, one.local)
            except CheckpointError as error:
                self._jobs[one] = error
        # As disks like it; what cannot be read last, where peers begin.
        self.ordered = sorted(self._jobs, key=self._place)

    def __enter__(self) -> _Disk:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._files.values():
            os.close(fd)

    def _place(self, one: Wanted) -> tuple[bool, str, int]:
        job = self._jobs[one]
        if isinstance(job, CheckpointError):
            return True, "", 0
        return False, job.tensors[0].name.shard, job.tensors[0].entry.begin

    def why_not(self, wanted: Wanted) -> Exception | None:
        """Return what is wrong with this expert's tensors."""
        job = self._jobs[wanted]
        return job if isinstance(job, CheckpointError) else None

    def load(self, wanted: Wanted) -> None:
        """Read one expert, and pack it if its form asks for that."""
        job = self._jobs[wanted]
        assert isinstance(job, _Job)
        self._load(job)
        with self._lock:
            self.bytes_read += sum(tensor.nbytes for tensor in job.tensors)

    def _job(self, layer: LayerExperts, number: int, local: int) -> _Job:
        inner, hidden, expert = self._spec.moe_intermediate_size, self._spec.hidden_size, layer.ids[local]
        found: dict[tuple[str, str], ExpertTensor]
        found = {(t.proj, t.kind): t for t in self._index.expert_tensors.get((number, expert), ())}
        tensors = []
        for proj, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            tensor = found.get((proj, "weight"))
            if tensor is None:
                raise CheckpointError(
                    f"{self._index.path}: layer {number}, expert {expert} has no {proj} projection in the checkpoint's "
                    f"index: download the checkpoint again"
                )
            tensors.append(self._tensor(tensor, found.get((proj, "scale")), shape, layer.form))
        gate, up, down = tensors
        return _Job(layer, local, (gate, up, down))

    def _tensor(
        self, tensor: ExpertTensor, scale: ExpertTensor | None, wanted: tuple[int, int], form: Form
    ) -> _Tensor:
        entry = self._entry(tensor)
        self._check(tensor, entry, wanted, set(_FILE_DTYPES))
        if entry.dtype != "F8_E4M3":
            if form in FP8:
                raise CheckpointError(
                    f"tensor {tensor.name} in {self._index.path / tensor.shard} is {entry.dtype}, where config.json "
                    f"says FP8: set experts.dtype: bfloat16"
                )
            return _Tensor(tensor, entry, None)
        if self._spec.expert_quant is None or scale is None:
            raise CheckpointError(
                f"tensor {tensor.name} in {self._index.path / tensor.shard} is FP8 without "
                f"{'a weight_scale_inv' if scale is None else 'quantization_config.weight_block_size in config.json'}: "
                f"download the checkpoint again"
            )
        rows, columns = self._spec.expert_quant.block_shape
        self._check(scale, self._entry(scale), (-(-wanted[0] // rows), -(-wanted[1] // columns)), {"F32", "BF16"})
        return _Tensor(tensor, entry, (scale, self._entry(scale)))

    def _check(self, tensor: ExpertTensor, entry: TensorEntry, shape: tuple[int, ...], dtypes: set[str]) -> None:
        where = f"tensor {tensor.name} in {self._index.path / tensor.shard}"
        if entry.shape != shape:
            raise CheckpointError(
                f"{where} has shape {list(entry.shape)}, but config.json makes it {list(shape)}: config.json and "
                f"weights are not of the same model; download both again"
            )
        if entry.dtype not in dtypes:
            raise CheckpointError(f"{where} is {entry.dtype}: use a checkpoint in one of {', '.join(sorted(dtypes))}")

    def _entry(self, tensor: ExpertTensor) -> TensorEntry:
        shard = self._index.path / tensor.shard
        if tensor.shard not in self._headers:
            self._headers[tensor.shard] = read_entries(shard)
        entry = self._headers[tensor.shard].get(tensor.name)
        if entry is None:
            raise CheckpointError(
                f"tensor {tensor.name} is missing from shard {shard}, where the index has it: download this shard again"
            )
        return entry

    def _load(self, job: _Job) -> None:
        layer, inner = job.layer, self._spec.moe_intermediate_size
        whole = self._whole(layer) if layer.form is Form.VECTOR_BFLOAT16 else None
        for projection, tensor in enumerate(job.tensors):
            scale = self._scale(job, projection)
            name, offset = ("gate_up", inner * projection) if projection < 2 else ("down", 0)
            for first, last in self._strips(tensor, layer):
                if whole is not None:
                    place = whole[0][offset:] if projection < 2 else whole[1]
                    self._read_as(tensor, first, last, scale, place[first:last])
                elif layer.form not in PACKED and layer.down.device.type == "cpu":
                    place = (layer.gate_up if projection < 2 else layer.down)[job.local, offset:]
                    self._read_as(tensor, first, last, scale, place[first:last])
                else:
                    rows_RC = self._buffer("rows", layer, last - first, tensor.entry.shape[1], DTYPES[layer.form])
                    self._read_as(tensor, first, last, scale, rows_RC)
                    put_rows(layer, job.local, name, offset + first, rows_RC)
        if whole is not None:
            store(layer, job.local, *whole)

    def _strips(self, tensor: _Tensor, layer: LayerExperts) -> list[tuple[int, int]]:
        """Return the rows (first, last + 1) that are read at once: all of them where they go straight into place, or
        to a GPU, which copies many rows faster.
        """
        rows, columns = tensor.entry.shape
        stored = _FILE_DTYPES[tensor.entry.dtype]
        if layer.down.is_cuda or (layer.form not in PACKED and stored is DTYPES[layer.form]):
            return [(0, rows)]
        block = BLOCK_ROWS
        if tensor.scale is not None:
            assert self._spec.expert_quant is not None
            block = math.lcm(block, self._spec.expert_quant.block_shape[0])
        step = max(1, _STRIP_BYTES // (columns * stored.itemsize) // block) * block
        return [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def _whole(self, layer: LayerExperts) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this thread's buffer of one expert, gate_up and down."""
        inner, hidden, dtype = self._spec.moe_intermediate_size, self._spec.hidden_size, DTYPES[layer.form]
        return (
            self._buffer("gate_up", layer, 2 * inner, hidden, dtype), self._buffer("down", layer, hidden, inner, dtype)
        )  # fmt: skip

    def _buffer(self, name: str, layer: LayerExperts, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a buffer of this thread, which keeps it: fresh memory costs more than reading into it."""
        kept: dict[str, torch.Tensor] = self._buffers.__dict__
        if name not in kept or kept[name].numel() < rows * columns:
            kept[name] = torch.empty(rows * columns, dtype=dtype, pin_memory=layer.down.is_cuda)
        return kept[name][: rows * columns].view(rows, columns)

    def _scale(self, job: _Job, projection: int) -> torch.Tensor | None:
        """Read a projection's block scales: into their place if the form keeps them. None without scales."""
        tensor = job.tensors[projection]
        if tensor.scale is None:
            return None
        name, entry = tensor.scale
        place = scale_place(job.layer, job.local, projection)
        stored = torch.empty(entry.shape, dtype=_FILE_DTYPES[entry.dtype])
        self._fill(name, entry.begin, entry.end, stored)
        if place is None:
            return stored.float()
        place.copy_(stored)
        return place

    def _read_as(
        self, tensor: _Tensor, first: int, last: int, scale: torch.Tensor | None, out_RC: torch.Tensor
    ) -> None:
        """Read rows `first` to `last` of a projection in the dtype of `out_RC`."""
        dtype, columns = _FILE_DTYPES[tensor.entry.dtype], tensor.entry.shape[1]
        begin, end = (tensor.entry.begin + row * columns * dtype.itemsize for row in (first, last))
        if out_RC.dtype == dtype:
            self._fill(tensor.name, begin, end, out_RC)
            return
        kept: dict[str, torch.Tensor] = self._buffers.__dict__
        if "stored" not in kept or kept["stored"].numel() < end - begin:
            kept["stored"] = torch.empty(end - begin, dtype=torch.uint8)
        stored_RC = kept["stored"][: end - begin].view(dtype).view(last - first, columns)
        self._fill(tensor.name, begin, end, stored_RC)
        if scale is None:
            out_RC.copy_(stored_RC)
        else:
            assert self._spec.expert_quant is not None
            block = self._spec.expert_quant.block_shape
            dequantise(stored_RC, scale[first // block[0] : -(-last // block[0])], block, out_RC)

    def _fill(self, tensor: ExpertTensor, begin: int, end: int, out: torch.Tensor) -> None:
        """Read bytes `begin` to `end` of the tensor's shard into `out`, which is contiguous and on the CPU."""
        buffer, done = bytes_of(out), 0
        while done < len(buffer):
            got = os.preadv(self._file(tensor.shard), [buffer[done:]], begin + done)
            if got == 0:
                raise _cut_off(self._index.path / tensor.shard, begin + done, end)
            done += got

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self._index.path / shard, os.O_RDONLY)
            return self._files[shard]


def _cut_off(shard: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"shard {shard} is truncated: it ends at byte {size}, but {expected} were promised: download this shard again"
    )
