"""The wire format between attention and expert workers (docs/wire-format.md is the same in words).

Legend: T rows (tokens), H hidden size, K experts per token (top-k). Little endian, no padding beyond what is named.

One frame is one gRPC message: a 40-byte header, then the sections of its kind. Tensors travel as raw bytes; nothing
is ever unpickled. Every length follows from the header, so a frame of any other length is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from cluster.errors import DeepsplitError, FrameError, StalePlacement, WorkerBusy, WorkerFailing
from routing.tokens import float8
from routing.tokens.request_ids import MAX_BYTES as MAX_REQUEST_IDS_BYTES

MAGIC = b"DSX1"
# magic, kind, dtype, reply dtype or whether the worker is fenced, error code or bytes of request ids, frame id, epoch,
# layer, rows, hidden or number of stale experts, top-k or queue time, deadline or compute time
_HEADER = struct.Struct("<4sBBBBQIIIIII")
HEADER_BYTES = _HEADER.size
_MAX_U32 = 2**32 - 1
# Rows of this size and more are copied into a frame from where they lie; smaller ones are gathered first, which takes
# less per row (64 frames of 8 rows of 14 KiB: 160 us against 280; of 2 KiB: no difference).
_VIEWED_ROW_BYTES = 4096
NO_EXPERT = -1  # one of a row's K entries that asks this worker for nothing


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1
    REPLY = 2
    ERROR = 3


_REQUEST, _REPLY, _ERROR = (int(kind) for kind in Kind)  # an enum's members cost a look-up each time
_DTYPES = {0: torch.float32, 1: torch.bfloat16, 2: torch.float16}
FLOAT8 = torch.float8_e4m3fn
_ROW_DTYPES = {**_DTYPES, 3: FLOAT8}  # of hidden states on their way to the experts
_CODES = {dtype: code for code, dtype in _ROW_DTYPES.items()}
_BAD_FRAME, _STALE, _BUSY, _FAILING = 1, 2, 3, 4  # error codes
_MAX_MESSAGE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class DispatchRequest:
    """Rows of one layer for one worker: `expert_ids_TK` int16, global, NO_EXPERT where an expert is another worker's;
    `weights_TK` float32.

    A decoded request has its hidden states in a dtype to compute with: rows that travelled as FP8 have the reply's.
    """

    frame_id: int
    epoch: int
    layer: int
    deadline_ms: int  # how long the caller will wait from now on; clocks are not compared
    hidden_TH: torch.Tensor
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor
    reply_dtype: torch.dtype
    request_ids: str = ""  # of the clients' requests whose rows these are, as `join_request_ids` writes them


@dataclass(frozen=True, slots=True)
class DispatchReply:
    """`output_TH` = per row, the weighted sum over the experts that this worker was asked for."""

    frame_id: int
    epoch: int
    layer: int
    queue_us: int  # from the request's arrival to the start of its computation
    compute_us: int
    output_TH: torch.Tensor


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """A worker's refusal of one request."""

    frame_id: int
    error: DeepsplitError


def _raw(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().view(torch.uint8).reshape(-1).numpy())  # type: ignore[arg-type]


def row_bytes(hidden: int, dtype: torch.dtype) -> int:
    """Size in bytes of one row's hidden states, with their scales if they travel as FP8."""
    return hidden * dtype.itemsize + (float8.blocks(hidden) * 4 if dtype == FLOAT8 else 0)


def request_bytes(rows: int, hidden: int, top_k: int, dtype: torch.dtype, request_ids_bytes: int = 0) -> int:
    """Size in bytes of a request frame: header + T rows + T*K (float32 weight + int16 id) + request ids."""
    return HEADER_BYTES + rows * (row_bytes(hidden, dtype) + top_k * 6) + request_ids_bytes


class WireRows:
    """Hidden states as they travel, in whatever dtype, and the frames' parts that some of them make."""

    def __init__(
        self, dtype: torch.dtype, hidden: int, values_TH: np.ndarray, scales_TB: np.ndarray | None = None
    ) -> None:
        """`values_TH`: the dtype's bits as integers; `scales_TB` float32, with FP8."""
        self.dtype = dtype
        self.hidden = hidden
        self._values_TH = values_TH
        self._scales_TB = scales_TB
        self._views_T: list[memoryview] | None = None  # one per row

    @classmethod
    def of(cls, hidden_TH: torch.Tensor, dtype: torch.dtype) -> WireRows:
        """Convert `hidden_TH` [T, H], which must not change afterwards: it may be used where it lies."""
        hidden = hidden_TH.shape[1]
        if dtype == FLOAT8:
            values_TH, scales_TB = float8.quantise(hidden_TH)
            return cls(dtype, hidden, values_TH.view(torch.uint8).numpy(), scales_TB.numpy())
        if hidden_TH.dtype != dtype:
            hidden_TH = hidden_TH.to(dtype)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        return cls(dtype, hidden, hidden_TH.contiguous().view(bits).numpy())

    def sections(self, rows_R: np.ndarray | None) -> list[np.ndarray | memoryview]:
        """Return buffers that hold the scales, if any, and the values of some rows, one after the other; None: of all.
        """
        values_TH, scales_TB = self._values_TH, self._scales_TB
        sections: list[np.ndarray | memoryview] = []
        if scales_TB is not None:
            sections.append(scales_TB if rows_R is None else scales_TB.take(rows_R, axis=0))
        if rows_R is None:
            sections.append(values_TH)
        elif values_TH.shape[1] * values_TH.itemsize < _VIEWED_ROW_BYTES:
            sections.append(values_TH.take(rows_R, axis=0))
        else:
            if self._views_T is None:
                self._views_T = [memoryview(values_H) for values_H in values_TH]
            sections += [self._views_T[row] for row in rows_R.tolist()]
        return sections


def pack_request(
    frame_id: int,
    epoch: int,
    layer: int,
    deadline_ms: int,
    rows: WireRows,
    rows_R: np.ndarray | None,
    expert_ids_RK: np.ndarray,
    weights_RK: np.ndarray,
    reply_dtype: torch.dtype,
    request_ids: bytes = b"",
) -> bytes:
    """Return the frame of some of `rows` (None: all): header, weights (float32), with FP8 the scales (float32), hidden
    states (their dtype), expert_ids (int16), request ids (UTF-8). Arrays are contiguous.
    """
    assert len(request_ids) <= MAX_REQUEST_IDS_BYTES, "join_request_ids bounds it"
    length, top_k = expert_ids_RK.shape
    header = _HEADER.pack(
        MAGIC, _REQUEST, _CODES[rows.dtype], _CODES[reply_dtype], len(request_ids), frame_id, epoch, layer, length,
        rows.hidden, top_k, deadline_ms,
    )  # fmt: skip
    sections = [header, weights_RK, *rows.sections(rows_R), expert_ids_RK, request_ids]
    return b"".join(sections)  # type: ignore[arg-type]  # numpy's stubs do not say that an array is a buffer


def encode_request(request: DispatchRequest, dtype: torch.dtype | None = None) -> bytes:
    """Return the frame of a request; hidden states travel as `dtype`, or as they are."""
    return pack_request(
        request.frame_id,
        request.epoch,
        request.layer,
        request.deadline_ms,
        WireRows.of(request.hidden_TH, dtype or request.hidden_TH.dtype),
        None,
        request.expert_ids_TK.contiguous().numpy(),
        request.weights_TK.contiguous().numpy(),
        request.reply_dtype,
        request.request_ids.encode(),
    )


def encode_reply(reply: DispatchReply) -> bytes:
    """Header, output_TH (its dtype)."""
    rows, hidden = reply.output_TH.shape
    code = _CODES[reply.output_TH.dtype]
    header = _HEADER.pack(
        MAGIC, Kind.REPLY, code, code, 0, reply.frame_id, reply.epoch, reply.layer, rows, hidden,
        min(reply.queue_us, _MAX_U32), min(reply.compute_us, _MAX_U32),
    )  # fmt: skip
    return b"".join((header, _raw(reply.output_TH)))


def encode_error(frame_id: int, error: DeepsplitError) -> bytes:
    """Header, the message in UTF-8 (at most 64 KiB), and the stale experts (int16), if any."""
    code, fenced, queue_us, stale = _FAILING, False, 0, b""
    if isinstance(error, FrameError):
        code = _BAD_FRAME
    elif isinstance(error, StalePlacement):
        code, stale = _STALE, np.array(error.experts, dtype=np.int16).tobytes()
    elif isinstance(error, WorkerBusy):
        code, queue_us = _BUSY, min(int(error.queue_s * 1e6), _MAX_U32)
    elif isinstance(error, WorkerFailing):
        fenced = error.fenced
    body = str(error).encode()[:_MAX_MESSAGE_BYTES] + stale
    header = _HEADER.pack(
        MAGIC, Kind.ERROR, 0, fenced, code, frame_id, 0, 0, len(body), len(stale) // 2, queue_us, 0
    )  # fmt: skip
    return header + body


def _decode_error(code: int, fenced: int, body: bytes, stale_experts: int, queue_us: int) -> DeepsplitError:
    if 2 * stale_experts > len(body):
        raise FrameError(f"an error reply of {len(body)} bytes cannot name {stale_experts} stale experts")
    end = len(body) - 2 * stale_experts
    message = body[:end].decode(errors="replace")
    if code == _BAD_FRAME:
        return FrameError(message)
    if code == _STALE:
        return StalePlacement(message, tuple(np.frombuffer(body, np.int16, stale_experts, end).tolist()))
    if code == _BUSY:
        return WorkerBusy(message, queue_us / 1e6)
    return WorkerFailing(message, bool(fenced))  # also what a newer worker says that we do not know


def _tensor(frame: bytes, offset: int, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    if not rows * columns:
        return torch.empty(rows, columns, dtype=dtype)
    return torch.frombuffer(frame, dtype=dtype, count=rows * columns, offset=offset).view(rows, columns)


def _unpack(frame: bytes) -> tuple[int, ...]:
    if len(frame) < HEADER_BYTES:
        raise FrameError(f"frame of {len(frame)} bytes is shorter than the {HEADER_BYTES}-byte header")
    fields: tuple[int, ...] = _HEADER.unpack_from(frame)
    if not frame.startswith(MAGIC):
        theirs = frame[:4]
        raise FrameError(f"frame starts with {theirs!r}, not {MAGIC!r}: the peer is no deepsplit of this wire version")
    return fields[1:]


def _dtype(code: int, known: dict[int, torch.dtype] = _DTYPES) -> torch.dtype:
    if code not in known:
        raise FrameError(f"unknown dtype code {code}; known are {sorted(known)}: is the peer of a newer version?")
    return known[code]


def _float8_rows(frame: bytes, at: int, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    blocks = float8.blocks(hidden)
    scales_TB = np.frombuffer(frame, np.float32, rows * blocks, at).reshape(rows, blocks).copy()
    if not (np.isfinite(scales_TB) & (scales_TB > 0)).all():
        raise FrameError("a scale of FP8 rows is not a positive finite number")
    values_TH = np.frombuffer(frame, np.uint8, rows * hidden, at + scales_TB.nbytes).reshape(rows, hidden)
    return float8.dequantise(values_TH, scales_TB, dtype)


def _check_length(frame: bytes, expected: int, what: str) -> None:
    if len(frame) != expected:
        raise FrameError(f"{what} of {len(frame)} bytes should have {expected} by its header: truncated or corrupt")


def peek_frame_id(frame: bytes) -> int:
    """The id of a frame whose body may be broken; 0 where even that cannot be read."""
    return _HEADER.unpack_from(frame)[5] if len(frame) >= HEADER_BYTES else 0


def peek_request_ids(frame: bytes) -> str:
    """The request ids of a frame whose body may be broken; empty where they cannot be read."""
    length = _HEADER.unpack_from(frame)[4] if len(frame) >= HEADER_BYTES else 0
    try:
        return _request_ids(frame, max(HEADER_BYTES, len(frame) - length))
    except FrameError:
        return ""


def _request_ids(frame: bytes, at: int) -> str:
    # It goes into log lines, so nothing in it may end one or hide what follows.
    try:
        request_ids = frame[at:].decode()
    except UnicodeDecodeError:
        raise FrameError("the request ids of a frame are not UTF-8") from None
    if not request_ids.isprintable():
        raise FrameError("the request ids of a frame have characters that cannot be printed")
    return request_ids


def decode_request(frame: bytes, hidden_size: int) -> DispatchRequest:
    """Raises FrameError for anything but a well-formed request of `hidden_size`. Tensors are views of `frame`, except
    hidden states that travelled as FP8: they come in the reply's dtype, each value times its scale.
    """
    kind, dtype_code, reply_code, ids_bytes, frame_id, epoch, layer, rows, hidden, top_k, deadline_ms = _unpack(frame)
    if kind != Kind.REQUEST:
        raise FrameError(f"expected a request (kind {Kind.REQUEST.value}), got kind {kind}")
    dtype, reply_dtype = _dtype(dtype_code, _ROW_DTYPES), _dtype(reply_code)
    if hidden != hidden_size:
        raise FrameError(f"hidden size {hidden} does not fit this model's {hidden_size}: different checkpoints?")
    _check_length(frame, request_bytes(rows, hidden, top_k, dtype, ids_bytes), "request")
    hidden_at = HEADER_BYTES + rows * top_k * 4
    ids_at = hidden_at + rows * row_bytes(hidden, dtype)
    if dtype == FLOAT8:
        hidden_TH = _float8_rows(frame, hidden_at, rows, hidden, reply_dtype)
        # Where both H and T are odd, the ids begin between two bytes of a word.
        ids_TK = np.frombuffer(frame, np.int16, rows * top_k, ids_at).reshape(rows, top_k).copy()
        expert_ids_TK = torch.from_numpy(ids_TK)
    else:
        hidden_TH = _tensor(frame, hidden_at, dtype, rows, hidden)
        expert_ids_TK = _tensor(frame, ids_at, torch.int16, rows, top_k)
    return DispatchRequest(
        frame_id, epoch, layer, deadline_ms, hidden_TH, expert_ids_TK,
        weights_TK=_tensor(frame, HEADER_BYTES, torch.float32, rows, top_k),
        reply_dtype=reply_dtype,
        request_ids=_request_ids(frame, len(frame) - ids_bytes),
    )  # fmt: skip


def decode_reply(frame: bytes) -> DispatchReply | ErrorReply:
    """Raises FrameError for anything but a well-formed reply or error. Tensors are views of `frame`."""
    kind, dtype_code, fenced, error_code, frame_id, epoch, layer, rows, hidden, queue_us, compute_us = _unpack(frame)
    if kind == _ERROR:
        _check_length(frame, HEADER_BYTES + rows, "error reply")
        return ErrorReply(frame_id, _decode_error(error_code, fenced, frame[HEADER_BYTES:], hidden, queue_us))
    if kind != _REPLY:
        raise FrameError(f"expected a reply, got kind {kind}")
    dtype = _dtype(dtype_code)
    _check_length(frame, HEADER_BYTES + rows * hidden * dtype.itemsize, "reply")
    output_TH = _tensor(frame, HEADER_BYTES, dtype, rows, hidden)
    return DispatchReply(frame_id, epoch, layer, queue_us, compute_us, output_TH)
