"""FP8 rows: how far they are off, and frames that carry them."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import FrameError
from routing.tokens.float8 import BLOCK, blocks, dequantise, quantise
from routing.tokens.wire import FLOAT8, HEADER_BYTES, DispatchRequest, decode_request, encode_request, request_bytes

TOP_K = 3
_SCALES_AT = HEADER_BYTES + 2 * TOP_K * 4  # in a frame of two rows


def request(hidden_TH: torch.Tensor, reply_dtype: torch.dtype = torch.float32) -> DispatchRequest:
    rows = len(hidden_TH)
    ids_TK = torch.arange(rows * TOP_K, dtype=torch.int16).view(rows, TOP_K)
    return DispatchRequest(7, 3, 60, 1500, hidden_TH, ids_TK, torch.rand(rows, TOP_K), reply_dtype, "cmpl-1")


def travelled(hidden_TH: torch.Tensor, reply_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return decode_request(encode_request(request(hidden_TH, reply_dtype), FLOAT8), hidden_TH.shape[1]).hidden_TH


@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 4), st.integers(1, 300), st.integers(0, 2**31), st.floats(-30, 30),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_error_bound(rows: int, hidden: int, seed: int, decades: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Values of very different size within a block, blocks of very different size.
    spread = torch.exp(4 * torch.randn(rows, hidden, generator=generator))
    hidden_TH = (torch.randn(rows, hidden, generator=generator) * spread * 10.0**decades).to(dtype)
    hidden_TH = torch.nan_to_num(hidden_TH, posinf=6e4, neginf=-6e4)
    got, exact = travelled(hidden_TH).double(), hidden_TH.double()
    for at in range(0, hidden, BLOCK):
        block, error = exact[:, at : at + BLOCK].abs(), (got - exact)[:, at : at + BLOCK].abs()
        most = block.amax(1, keepdim=True) if rows else block
        assert (error <= torch.maximum(block / 16, most / 2**17) + 2.0**-136).all()  # float32 ends near there


def test_bfloat16_holds_what_was_sent_exactly() -> None:
    hidden_TH = torch.randn(5, 384)
    assert torch.equal(travelled(hidden_TH, torch.bfloat16).float(), travelled(hidden_TH))


def test_powers_of_two_and_nought_survive() -> None:
    hidden_TH = torch.zeros(2, 256)
    hidden_TH[0, :8] = torch.tensor([448.0, -448.0, 1.0, -0.5, 2.0**-6, 0.0, 256.0, 3.0])
    assert torch.equal(travelled(hidden_TH), hidden_TH)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_not_hidden(value: float) -> None:
    hidden_TH = torch.ones(2, 200)
    hidden_TH[0, 130] = value
    got = travelled(hidden_TH)
    assert got[0, 130].isnan()
    assert torch.equal(got[0, :128], hidden_TH[0, :128])
    assert torch.equal(got[1], hidden_TH[1])


@pytest.mark.parametrize("hidden", [1, 127, 128, 129, 333])
@pytest.mark.parametrize("rows", [1, 3])
def test_frames_have_one_scale_per_started_block(rows: int, hidden: int) -> None:
    sent = request(torch.randn(rows, hidden))
    frame = encode_request(sent, FLOAT8)
    assert len(frame) == request_bytes(rows, hidden, TOP_K, FLOAT8, len("cmpl-1"))
    assert len(frame) == HEADER_BYTES + rows * (hidden + -(-hidden // 128) * 4 + TOP_K * 6) + 6
    got = decode_request(frame, hidden)
    assert torch.equal(got.expert_ids_TK, sent.expert_ids_TK)
    assert torch.equal(got.weights_TK, sent.weights_TK)
    assert got.request_ids == "cmpl-1"
    values, scales = quantise(sent.hidden_TH)
    assert scales.shape == (rows, blocks(hidden))
    assert torch.equal(got.hidden_TH, dequantise(values.view(torch.uint8).numpy(), scales.numpy(), torch.float32))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_no_client_sends_is_refused(scale: float) -> None:
    frame = bytearray(encode_request(request(torch.ones(2, 200)), FLOAT8))
    struct.pack_into("<f", frame, _SCALES_AT + 4, scale)
    with pytest.raises(FrameError, match="not a positive finite number"):
        decode_request(bytes(frame), 200)


@pytest.mark.parametrize("cut", [1, 6, 400])
def test_truncation_is_named(cut: int) -> None:
    frame = encode_request(request(torch.ones(2, 200)), FLOAT8)
    with pytest.raises(FrameError, match="truncated"):
        decode_request(frame[:-cut], 200)
    with pytest.raises(FrameError, match="truncated"):
        decode_request(frame + b"x" * cut, 200)


def test_replies_are_never_fp8() -> None:
    frame = bytearray(encode_request(request(torch.ones(2, 200)), FLOAT8))
    frame[6] = frame[5]  # the dtype wanted in the reply
    with pytest.raises(FrameError, match="unknown dtype code 3"):
        decode_request(bytes(frame), 200)


def test_any_scale_of_a_peer_is_applied_in_float32() -> None:
    values = np.array([[0x38, 0x40, 0xB8]], dtype=np.uint8)  # 1, 2, -1
    got = dequantise(values, np.array([[0.3]], dtype=np.float32), torch.float32)
    torch.testing.assert_close(got, torch.tensor([[0.3, 0.6, -0.3]]))
