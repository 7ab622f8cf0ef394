"""Reads a worker's share of the routed experts from safetensors shards, and brings it into the form that computes.

Several threads take one expert at a time: its byte ranges are read (`preadv`) straight into place where the form is the
stored one, else into a buffer of one expert, from which it is packed or converted. Memory peaks at the final weights
plus one expert per thread.

Legend of shape suffixes: N held experts of a layer, H hidden size, I intermediate size of one expert.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.errors import CheckpointError
from cluster.model.checkpoint import CheckpointIndex, ExpertTensor, TensorEntry, read_entries
from cluster.model.spec import ModelSpec
from deployments.experts.forms import Form
from deployments.experts.packing import lift_low_blocks, pack

_FILE_DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
# What an expert is brought to before it is packed, if it is.
_DTYPES = {
    Form.FLOAT32: torch.float32, Form.FLOAT16: torch.float16, Form.BFLOAT16: torch.bfloat16,
    Form.GROUPED_BFLOAT16: torch.bfloat16, Form.VECTOR_BFLOAT16: torch.bfloat16, Form.PACKED_BFLOAT16: torch.bfloat16,
    Form.PACKED_INT8: torch.float32, Form.PACKED_FP8: torch.float8_e4m3fn, Form.GROUPED_FP8: torch.float8_e4m3fn,
}  # fmt: skip
_PACKED = (Form.VECTOR_BFLOAT16, Form.PACKED_BFLOAT16, Form.PACKED_INT8, Form.PACKED_FP8)
_FP8 = (Form.PACKED_FP8, Form.GROUPED_FP8)
_INT8_MAX, _LEAST_ABS = 127, 1e-30  # a row of zeros has a scale too
_THREADS = 4  # of a load: more wait for the same disk or memory

_SIGN_AND_LOW_BITS = ~0x4000  # of a float16 made from a sign-extended E4M3
_NAN_CODE = 0x7F

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class LayerExperts:
    """The held experts of one layer, stacked: index n is expert `ids[n]`.

    Plain forms: `gate_up` [N, 2I, H] (gate rows, then up rows) and `down` [N, H, I], as `torch.nn.functional.linear`
    takes them. Packed forms: the same rows in an order, and for INT8 with a compensation, that only the kernel knows.
    Scales: INT8 float32 [N, 2I] and [N, H], one per row; FP8 float32 [N, 2I/128, H/128] and [N, H/128, I/128].
    """

    ids: tuple[int, ...]  # global ids, ascending
    form: Form
    hidden_size: int
    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Return the dtype in which the kernel takes hidden states."""
        return torch.bfloat16 if self.form in (*_PACKED, *_FP8) else self.gate_up.dtype

    @property
    def expert_bytes(self) -> int:
        """Return the size of one expert in memory."""
        stacks = (self.gate_up, self.down, self.gate_up_scale, self.down_scale)
        return sum(stack.nbytes // len(stack) for stack in stacks if stack is not None and len(stack))

    @property
    def nbytes(self) -> int:
        """Return the size in memory, if all are there."""
        return self.expert_bytes * len(self.ids)


@dataclass(frozen=True)
class ExpertWeights:
    """The weights of one worker's share."""

    layers: Mapping[int, LayerExperts]
    num_experts: int  # of the model, per layer
    bytes_read: int  # from the shards, their headers left out

    @property
    def nbytes(self) -> int:
        """Return the size in memory."""
        return sum(layer.nbytes for layer in self.layers.values())


def load_experts(
    index: CheckpointIndex,
    spec: ModelSpec,
    assignment: Mapping[int, Sequence[int]],
    form: Form,
    device: str = "cpu",
    on_progress: OnProgress | None = None,
) -> ExpertWeights:
    """Return the experts of `assignment` (global ids by layer) in `form`, which `choose_form` has found possible.

    `on_progress(done_bytes, total_bytes)` is called after each tensor, by one thread at a time. Opens only the shards
    that it needs. Raises CheckpointError if a tensor is missing or of a wrong shape or dtype, or a shard is missing or
    truncated.
    """
    layers = {layer: empty_layer(spec, tuple(sorted(assignment[layer])), form, device) for layer in sorted(assignment)}
    bytes_read = read_experts(index, spec, layers, assignment, on_progress)
    return ExpertWeights(layers, spec.num_experts, bytes_read)


def read_experts(
    index: CheckpointIndex,
    spec: ModelSpec,
    layers: Mapping[int, LayerExperts],
    share: Mapping[int, Sequence[int]],
    on_progress: OnProgress | None = None,
) -> int:
    """Read a share of the experts (global ids by layer) into their places in `layers`, as `load_experts` does. Returns
    the bytes that were read.
    """
    reader = _Reader(index, spec, on_progress)
    reader.read(layers, share)
    return reader.bytes_read


def shapes_of(spec: ModelSpec, experts: int, form: Form) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the stacks of a layer with so many experts: gate_up, down, and scales if there are."""
    inner, hidden = spec.moe_intermediate_size, spec.hidden_size
    if form is Form.PACKED_INT8:
        return [
            ((experts, 2 * inner, hidden + 4), torch.int8), ((experts, hidden, inner + 4), torch.int8),  # an int32 more
            ((experts, 2 * inner), torch.float32), ((experts, hidden), torch.float32),
        ]  # fmt: skip
    stacks = [((experts, 2 * inner, hidden), _DTYPES[form]), ((experts, hidden, inner), _DTYPES[form])]
    if form in _FP8:
        scales = ((experts, 2 * inner // 128, hidden // 128), (experts, hidden // 128, inner // 128))
        return [*stacks, *((shape, torch.float32) for shape in scales)]
    return [*stacks]


def layer_of(spec: ModelSpec, ids: tuple[int, ...], form: Form, stacks: Sequence[torch.Tensor]) -> LayerExperts:
    """Return a layer with room for `ids` in `stacks`, whose shapes are `shapes_of`."""
    return LayerExperts(ids, form, spec.hidden_size, *stacks)


def empty_layer(spec: ModelSpec, ids: tuple[int, ...], form: Form, device: str = "cpu") -> LayerExperts:
    """Return a layer with room for `ids` and nothing in it."""
    stacks = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes_of(spec, len(ids), form)]
    return layer_of(spec, ids, form, stacks)


def store(layer: LayerExperts, local: int, gate_up_2IH: torch.Tensor, down_HI: torch.Tensor) -> None:
    """Put one expert into its place: packed or quantised first, if the layer's form says so.

    FP8's scales are in their place before. It and they may be changed here, as the kernel needs them.
    """
    for stack, scales, weight in (
        (layer.gate_up, layer.gate_up_scale, gate_up_2IH), (layer.down, layer.down_scale, down_HI)
    ):  # fmt: skip
        if layer.form is Form.PACKED_INT8:
            assert scales is not None
            scale = weight.abs().amax(1).clamp_(min=_LEAST_ABS).div_(_INT8_MAX)
            scales[local] = scale
            weight = (weight / scale[:, None]).round_().to(torch.int8)
        if layer.form is Form.VECTOR_BFLOAT16:
            torch.ops._C.prepack_moe_weight(weight[None], stack[local : local + 1], "vec")
        elif layer.form in _PACKED:
            if layer.form is Form.PACKED_FP8:
                assert scales is not None
                lift_low_blocks(weight, scales[local], (128, 128))
            pack(weight, stack[local])
        elif weight.data_ptr() != stack[local].data_ptr():
            stack[local].copy_(weight, non_blocking=True)
    if layer.down.is_cuda:
        torch.cuda.current_stream().synchronize()  # the next expert is read into the same pinned buffers


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


class _Reader:
    def __init__(self, index: CheckpointIndex, spec: ModelSpec, on_progress: OnProgress | None) -> None:
        self._index, self._spec, self._on_progress = index, spec, on_progress
        self._headers: dict[str, dict[str, TensorEntry]] = {}
        self._files: dict[str, int] = {}
        self._counting = threading.Lock()
        self._buffers = threading.local()
        self.bytes_read = self._total = 0

    def read(self, layers: Mapping[int, LayerExperts], share: Mapping[int, Sequence[int]]) -> None:
        jobs = []
        for number, experts in share.items():
            place = {expert: local for local, expert in enumerate(layers[number].ids)}
            jobs += [self._job(layers[number], number, place[expert]) for expert in experts]
        self._total = sum(tensor.nbytes for job in jobs for tensor in job.tensors)
        jobs.sort(key=lambda job: (job.tensors[0].name.shard, job.tensors[0].entry.begin))  # as disks like it
        try:
            for shard in self._headers:
                self._files[shard] = os.open(self._index.path / shard, os.O_RDONLY)
            with ThreadPoolExecutor(min(_THREADS, len(os.sched_getaffinity(0))), "load") as pool:
                for done in [pool.submit(self._load, job) for job in jobs]:
                    try:
                        done.result()
                    except BaseException:
                        pool.shutdown(wait=True, cancel_futures=True)
                        raise
        finally:
            for fd in self._files.values():
                os.close(fd)

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
            if form in _FP8:
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
        self._check(scale, self._entry(scale), (-(-wanted[0] // rows), -(-wanted[1] // columns)), {"F32"})
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
        gate_up, down = self._places(job)
        inner = self._spec.moe_intermediate_size
        places = (gate_up[:inner], gate_up[inner:], down)
        for number, (tensor, out) in enumerate(zip(job.tensors, places, strict=True)):
            scale = self._scale(job, number)
            self._read_as(tensor, out, scale)
            self._count(tensor.nbytes)
        store(job.layer, job.local, gate_up, down)

    def _places(self, job: _Job) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where an expert is read to: its place in the stack, or this thread's buffer."""
        layer = job.layer
        if layer.form not in _PACKED and layer.down.device.type == "cpu":
            return layer.gate_up[job.local], layer.down[job.local]
        if not hasattr(self._buffers, "places"):
            inner, hidden = self._spec.moe_intermediate_size, self._spec.hidden_size
            dtype = _DTYPES[layer.form]
            self._buffers.places = (
                torch.empty(2 * inner, hidden, dtype=dtype, pin_memory=layer.down.is_cuda),
                torch.empty(hidden, inner, dtype=dtype, pin_memory=layer.down.is_cuda),
            )  # fmt: skip
        places: tuple[torch.Tensor, torch.Tensor] = self._buffers.places
        return places

    def _scale(self, job: _Job, number: int) -> torch.Tensor | None:
        """Read the scales of projection `number`: into their place if the form keeps them. None without scales."""
        tensor, layer = job.tensors[number], job.layer
        if tensor.scale is None:
            return None
        name, entry = tensor.scale
        if layer.form in _FP8:
            assert layer.gate_up_scale is not None
            assert layer.down_scale is not None
            half = len(layer.gate_up_scale[job.local]) // 2
            up = layer.gate_up_scale[job.local]
            place = (up[:half], up[half:], layer.down_scale[job.local])[number]
            if place.device.type == "cpu":
                self._fill(name, entry, place)
                return place
        scale = torch.empty(entry.shape, dtype=torch.float32)
        self._fill(name, entry, scale)
        if layer.form in _FP8:
            place.copy_(scale)
        return scale

    def _read_as(self, tensor: _Tensor, out: torch.Tensor, scale: torch.Tensor | None) -> None:
        dtype = _FILE_DTYPES[tensor.entry.dtype]
        if out.dtype == dtype:
            self._fill(tensor.name, tensor.entry, out)
            return
        stored = torch.empty(tensor.entry.shape, dtype=dtype)
        self._fill(tensor.name, tensor.entry, stored)
        if scale is None:
            out.copy_(stored)
        else:
            assert self._spec.expert_quant is not None
            dequantise(stored, scale, self._spec.expert_quant.block_shape, out)

    def _fill(self, tensor: ExpertTensor, entry: TensorEntry, out: torch.Tensor) -> None:
        """Read the tensor's bytes into `out`, which is contiguous and on the CPU."""
        buffer, done = memoryview(out.view(torch.uint8).reshape(-1).numpy()), 0  # type: ignore[arg-type]
        while done < len(buffer):
            got = os.preadv(self._files[tensor.shard], [buffer[done:]], entry.begin + done)
            if got == 0:
                raise _cut_off(self._index.path / tensor.shard, entry.begin + done, entry.end)
            done += got

    def _count(self, nbytes: int) -> None:
        with self._counting:
            self.bytes_read += nbytes
            if self._on_progress is not None:
                self._on_progress(self.bytes_read, self._total)


def _cut_off(shard: Path, size: int, expected: int) -> CheckpointError:
    return CheckpointError(
        f"shard {shard} is truncated: it ends at byte {size}, but {expected} were promised: download this shard again"
    )
