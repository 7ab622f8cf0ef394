"""Frames survive the round trip; anything else is refused by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DeepsplitError, FrameError, StalePlacement
from routing.tokens.request_ids import join_request_ids
from routing.tokens.wire import (
    FLOAT8,
    HEADER_BYTES,
    DispatchReply,
    DispatchRequest,
    ErrorReply,
    WireRows,
    decode_reply,
    decode_request,
    encode_error,
    encode_reply,
    encode_request,
    pack_request,
    peek_request_ids,
    request_bytes,
)  # fmt: skip

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
REQUEST_IDS = st.lists(st.text(max_size=60), max_size=9).map(join_request_ids)


def make_request(rows: int, hidden: int, top_k: int, dtype: torch.dtype, request_ids: str = "") -> DispatchRequest:
    return DispatchRequest(
        7, 3, 60, 1500, torch.ones(rows, hidden, dtype=dtype), torch.zeros(rows, top_k, dtype=torch.int16),
        torch.ones(rows, top_k), torch.bfloat16, request_ids,
    )  # fmt: skip


def any_bits(data: st.DataObject, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of bits that hypothesis chooses: not-a-numbers and negative zeros too."""
    size = rows * columns * dtype.itemsize
    raw = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    return torch.frombuffer(raw, dtype=dtype).view(rows, columns) if size else torch.empty(rows, columns, dtype=dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))


@settings(max_examples=50, deadline=None)
@given(st.data(), st.integers(0, 9), st.integers(1, 40), st.integers(1, 9), DTYPES, REQUEST_IDS)
def test_request_round_trip(
    data: st.DataObject, rows: int, hidden: int, top_k: int, dtype: torch.dtype, request_ids: str
) -> None:
    sent = replace(
        make_request(rows, hidden, top_k, dtype, request_ids),
        hidden_TH=any_bits(data, rows, hidden, dtype),
        expert_ids_TK=any_bits(data, rows, top_k, torch.int16),
        weights_TK=any_bits(data, rows, top_k, torch.float32),
    )
    frame = encode_request(sent)
    assert len(frame) == request_bytes(rows, hidden, top_k, dtype, len(request_ids.encode()))
    got = decode_request(frame, hidden)
    assert (got.frame_id, got.epoch, got.layer, got.deadline_ms) == (7, 3, 60, 1500)
    assert got.request_ids == peek_request_ids(frame) == request_ids
    assert got.reply_dtype == torch.bfloat16
    for name in ("hidden_TH", "expert_ids_TK", "weights_TK"):
        assert same_bits(getattr(got, name), getattr(sent, name))


@settings(max_examples=40, deadline=None)
@given(
    st.sets(st.integers(0, 5)), st.sampled_from([8, 130, 5000]),
    st.sampled_from([torch.bfloat16, torch.float32, FLOAT8]),
)  # fmt: skip
def test_some_rows_of_a_batch_make_the_frame_of_these_rows(some: set[int], hidden: int, dtype: torch.dtype) -> None:
    hidden_TH, ids_TK = torch.randn(6, hidden), torch.arange(12, dtype=torch.int16).view(6, 2)
    rows_R = np.array(sorted(some), dtype=np.int64)
    weights_RK = torch.rand(len(some), 2)
    frame = pack_request(
        7, 3, 60, 1500, WireRows.of(hidden_TH, dtype), rows_R, ids_TK[rows_R].numpy(), weights_RK.numpy(),
        torch.bfloat16,
    )  # fmt: skip
    alone = DispatchRequest(7, 3, 60, 1500, hidden_TH[rows_R], ids_TK[rows_R], weights_RK, torch.bfloat16)
    assert frame == encode_request(alone, dtype)


@given(st.data(), st.integers(0, 9), st.integers(1, 40), DTYPES)
@settings(max_examples=30, deadline=None)
def test_reply_round_trip(data: st.DataObject, rows: int, hidden: int, dtype: torch.dtype) -> None:
    output_TH = any_bits(data, rows, hidden, dtype)
    got = decode_reply(encode_reply(DispatchReply(9, 2, 5, 4567, 123, output_TH)))
    assert isinstance(got, DispatchReply)
    assert (got.frame_id, got.epoch, got.layer, got.queue_us, got.compute_us) == (9, 2, 5, 4567, 123)
    assert got.output_TH.shape == (rows, hidden)
    assert same_bits(got.output_TH, output_TH)


def test_error_round_trip_keeps_class_and_text() -> None:
    got = decode_reply(encode_error(5, StalePlacement("layer 3: expert 9 moved")))
    assert isinstance(got, ErrorReply)
    assert got.frame_id == 5
    assert type(got.error) is StalePlacement
    assert str(got.error) == "layer 3: expert 9 moved"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_not_crashed_on(frame: bytes) -> None:
    for decode in (lambda: decode_request(frame, 8), lambda: decode_reply(frame)):
        with pytest.raises(DeepsplitError):
            decode()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_flipped_header_byte_never_reads_out_of_bounds(data: st.DataObject) -> None:
    frame = bytearray(encode_request(make_request(2, 8, 3, torch.bfloat16, "cmpl-1,cmpl-2")))
    at = data.draw(st.integers(0, HEADER_BYTES - 1))
    frame[at] = data.draw(st.integers(0, 255))
    assert peek_request_ids(bytes(frame)).isprintable()
    try:
        got = decode_request(bytes(frame), 8)
    except FrameError:
        return
    assert got.hidden_TH.shape == (2, 8)
    assert got.request_ids == "cmpl-1,cmpl-2"


@pytest.mark.parametrize("request_ids", [b"cmpl-1\n{}", b"\x1b[2K", b"\xff\xfe", "\u202egnp".encode()])
def test_request_ids_that_could_forge_a_log_line_are_refused(request_ids: bytes) -> None:
    frame = bytearray(encode_request(make_request(2, 8, 3, torch.float32)) + request_ids)
    frame[7] = len(request_ids)
    with pytest.raises(FrameError, match="the request ids of a frame"):
        decode_request(bytes(frame), 8)
    assert peek_request_ids(bytes(frame)) == ""


@pytest.mark.parametrize("cut", [0, 10, HEADER_BYTES, HEADER_BYTES + 5])
def test_truncation_is_named(cut: int) -> None:
    frame = encode_request(make_request(2, 8, 3, torch.float32))
    with pytest.raises(FrameError, match=r"shorter than|truncated"):
        decode_request(frame[:cut], 8)


def test_wrong_hidden_size_is_named() -> None:
    with pytest.raises(FrameError, match="hidden size 8 does not fit this model's 16"):
        decode_request(encode_request(make_request(2, 8, 3, torch.float32)), 16)
