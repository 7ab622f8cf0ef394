"""Reads a worker's share of the routed experts from safetensors shards into stacked tensors, and nothing else.

Each tensor's byte range is read straight into its place (`preadv`): memory peaks at the final weights plus one tensor.

Legend of shape suffixes: N held experts of a layer, H hidden size, I intermediate size of one expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import CheckpointError
from cluster.model.checkpoint import CheckpointIndex, ExpertTensor, TensorEntry, read_entries
from cluster.model.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FILE_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip

_SIGN_AND_LOW_BITS = ~0x4000  # of a float16 made from a sign-extended E4M3
_NAN_CODE = 0x7F

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerExperts:
    """The held experts of one layer, stacked: index n is expert `ids[n]`."""

    ids: tuple[int, ...]  # global ids, ascending
    gate_up_N2IH: torch.Tensor  # [N, 2I, H]: gate rows, then up rows
    down_NHI: torch.Tensor  # [N, H, I]


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one worker's share."""

    layers: Mapping[int, LayerExperts]
    num_experts: int  # of the model, per layer
    bytes_read: int  # from the shards, their headers left out

    @property
    def nbytes(self) -> int:
        """Return the size in memory."""
        return sum(layer.gate_up_N2IH.nbytes + layer.down_NHI.nbytes for layer in self.layers.values())


def load_experts(
    index: CheckpointIndex,
    spec: ModelSpec,
    assignment: Mapping[int, Sequence[int]],
    dtype: str | torch.dtype,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
) -> ExpertWeights:
    """Return the experts of `assignment` (global ids by layer) as `dtype`; FP8 is dequantised.

    `on_progress(done_bytes, total_bytes)` is called after each tensor. Opens only the shards that it needs.
    Raises CheckpointError if a tensor is missing or of a wrong shape or dtype, or a shard is missing or truncated.
    """
    compute_dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    inner, hidden = spec.moe_intermediate_size, spec.hidden_size
    layers = {
        layer: LayerExperts(
            tuple(ids := sorted(assignment[layer])),
            torch.empty(len(ids), 2 * inner, hidden, dtype=compute_dtype, device=device),
            torch.empty(len(ids), hidden, inner, dtype=compute_dtype, device=device),
        )
        for layer in sorted(assignment)
    }
    reader = _Reader(index, spec, on_progress)
    reader.read(layers)
    return ExpertWeights(layers, spec.num_experts, reader.bytes_read)


def dequantise(weight_RC: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int], out_RC: torch.Tensor) -> None:
    """Compute weight x its block's scale in float32 and write it to `out_RC`, rounded to its dtype.

    weight_RC: float8_e4m3fn [R, C]. scale_inv: float32 [ceil(R/rows), ceil(C/columns)]; the last blocks may be ragged.

    torch's own conversion from float8 is 7x slower than moving bits: the seven lower bits of E4M3, shifted into place,
    are a float16 (bias 15 for 7, subnormals too) that is 2**8 times too small. Only NaN comes out finite.
    """
    rows, columns = block
    codes = weight_RC.view(torch.int8)
    half = torch.empty(rows, codes.shape[1], dtype=torch.int16)
    full = torch.empty(rows, codes.shape[1], dtype=torch.float32)
    for at, scales in enumerate(scale_inv):
        strip = codes[at * rows : (at + 1) * rows]
        bits, values = half[: len(strip)], full[: len(strip)]
        bits.copy_(strip)  # extends the sign
        bits.bitwise_left_shift_(7).bitwise_and_(_SIGN_AND_LOW_BITS)
        values.copy_(bits.view(torch.float16))
        values *= (scales * 256).repeat_interleave(columns)[: strip.shape[1]]
        if int(strip.bitwise_and(127).max()) == _NAN_CODE:
            values[strip.bitwise_and(127) == _NAN_CODE] = torch.nan
        out_RC[at * rows : (at + 1) * rows] = values


@dataclass(frozen=True)
class _Job:
    """One projection of one expert and the slice of the stacked tensor that it fills."""

    weight: ExpertTensor
    entry: TensorEntry
    scale: ExpertTensor | None
    out: torch.Tensor


class _Reader:
    def __init__(self, index: CheckpointIndex, spec: ModelSpec, on_progress: OnProgress | None) -> None:
        self._index, self._spec, self._on_progress = index, spec, on_progress
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self._files: dict[str, int] = {}
        self.bytes_read = self._total = 0

    def read(self, layers: Mapping[int, LayerExperts]) -> None:
        jobs = [job for layer, weights in layers.items() for job in self._jobs(layer, weights)]
        self._total = sum(job.entry.end - job.entry.begin for job in jobs)
        self._total += sum(e.end - e.begin for job in jobs if job.scale for e in [self._entry(job.scale)])
        jobs.sort(key=lambda job: (job.weight.shard, job.entry.begin))  # front to back, as disks like it
        try:
            for job in jobs:
                self._load(job)
        finally:
            for fd in self._files.values():
                os.close(fd)

    def _jobs(self, layer: int, weights: LayerExperts) -> list[_Job]:
        inner, jobs = self._spec.moe_intermediate_size, []
        for local, expert in enumerate(weights.ids):
            found: dict[tuple[str, str], ExpertTensor]
            found = {(t.proj, t.kind): t for t in self._index.expert_tensors.get((layer, expert), ())}
            places = {
                "gate": weights.gate_up_N2IH[local, :inner],
                "up": weights.gate_up_N2IH[local, inner:],
                "down": weights.down_NHI[local],
            }
            for proj, out in places.items():
                tensor = found.get((proj, "weight"))
                if tensor is None:
                    raise CheckpointError(
                        f"{self._index.path}: layer {layer}, expert {expert} has no {proj} projection in the checkpoint"
                        f"'s index: download the checkpoint again"
                    )
                jobs.append(self._job(tensor, found.get((proj, "scale")), out))
        return jobs

    def _job(self, tensor: ExpertTensor, scale: ExpertTensor | None, out: torch.Tensor) -> _Job:
        entry = self._entry(tensor)
        self._check(tensor, entry, tuple(out.shape), set(_FILE_DTYPES))
        if entry.dtype != "F8_E4M3":
            return _Job(tensor, entry, None, out)
        if self._spec.expert_quant is None or scale is None:
            raise CheckpointError(
                f"tensor {tensor.name} in {self._index.path / tensor.shard} is FP8 without "
                f"{'a weight_scale_inv' if scale is None else 'quantization_config.weight_block_size in config.json'}: "
                f"download the checkpoint again"
            )
        rows, columns = self._spec.expert_quant.block_shape
        shape = (-(-out.shape[0] // rows), -(-out.shape[1] // columns))
        self._check(scale, self._entry(scale), shape, {"F32"})
        return _Job(tensor, entry, scale, out)

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
        dtype, shape = _FILE_DTYPES[job.entry.dtype], job.entry.shape
        if job.out.dtype == dtype and job.out.device.type == "cpu":
            self._fill(job.weight, job.entry, job.out)
        else:
            stored = torch.empty(shape, dtype=dtype)
            self._fill(job.weight, job.entry, stored)
            if job.scale is None:
                job.out.copy_(stored)
            else:
                assert self._spec.expert_quant is not None
                entry = self._entry(job.scale)
                scale = torch.empty(entry.shape, dtype=torch.float32)
                self._fill(job.scale, entry, scale)
                dequantise(stored, scale, self._spec.expert_quant.block_shape, job.out)
        if self._on_progress is not None:
            self._on_progress(self.bytes_read, self._total)

    def _fill(self, tensor: ExpertTensor, entry: TensorEntry, out: torch.Tensor) -> None:
        """Read the tensor's bytes into `out`, which is contiguous and on the CPU."""
        shard = self._index.path / tensor.shard
        if tensor.shard not in self._files:
            self._files[tensor.shard] = os.open(shard, os.O_RDONLY)
        buffer, done = memoryview(out.view(torch.uint8).reshape(-1).numpy()), 0  # type: ignore[arg-type]
        while done < len(buffer):
            got = os.preadv(self._files[tensor.shard], [buffer[done:]], entry.begin + done)
            if got == 0:
                raise _cut_off(shard, entry.begin + done, entry.end)
            done += got
        self.bytes_read += done


def _cut_off(shard: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"shard {shard} is truncated: it ends at byte {size}, but {expected} were promised: download this shard again"
    )
