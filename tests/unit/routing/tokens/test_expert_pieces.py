"""Pieces of experts over real gRPC: what comes, and who gets nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from cluster.config import DispatchConfig
from routing.tokens.channel import LAYOUT_KEY, MODEL_KEY, PIECE_PATH
from routing.tokens.expert_pieces import PIECE_BYTES, ExpertPeer, PeerAway
from routing.tokens.server import ExpertServer
from tests.unit.routing.tokens.expert_calls import HIDDEN, MODEL, twice

SIZES = (3 * PIECE_BYTES + 5, 7)  # of an expert's parts


class Held:
    """Experts 0 and 1 of layer 1, until a test takes one away."""

    layout = "plain"

    def __init__(self) -> None:
        self.experts = {expert: [bytes([expert * 8 + part]) * size for part, size in enumerate(SIZES)]
                        for expert in (0, 1)}  # fmt: skip
        self.reads = 0
        self.dropped_after = 1 << 30

    def read(self, layer: int, expert: int, part: int, offset: int, length: int) -> bytes:
        self.reads += 1
        if layer != 1 or expert not in self.experts or self.reads > self.dropped_after:
            return b""
        if part >= len(SIZES) or offset + length > SIZES[part]:
            raise ValueError("no such bytes")
        return self.experts[expert][part][offset : offset + length]


@contextmanager
def serving(held: Held | None) -> Iterator[str]:
    server = ExpertServer(twice, HIDDEN, MODEL, DispatchConfig(), pieces=held)
    try:
        yield server.start("127.0.0.1")
    finally:
        server.stop(1)


def peer(address: str, model: str = MODEL, layout: str = "plain") -> ExpertPeer:
    return ExpertPeer(address, model, layout, DispatchConfig(connect_timeout_s=0.5), None)


def places() -> list[bytearray]:
    return [bytearray(size) for size in SIZES]


def test_every_byte_of_an_expert_comes() -> None:
    held = Held()
    with serving(held) as address:
        link = peer(address)
        for expert in (1, 0):
            parts = places()
            assert link.fetch(1, expert, [memoryview(part) for part in parts])
            assert parts == held.experts[expert]
        link.close()


def test_what_is_not_held_does_not_come() -> None:
    held = Held()
    with serving(held) as address:
        link, parts = peer(address), [memoryview(part) for part in places()]
        assert not link.fetch(1, 2, parts)
        assert not link.fetch(2, 0, parts)
        held.dropped_after = held.reads + 3  # in the middle
        assert not link.fetch(1, 0, parts)
        held.dropped_after = 1 << 30
        assert link.fetch(1, 0, parts)
        link.close()


@pytest.mark.parametrize(("model", "layout", "why"), [
    ("other", "plain", "FAILED_PRECONDITION: this worker serves model model, the caller other"),
    (MODEL, "packed", "FAILED_PRECONDITION: this worker holds experts as plain, the caller as packed"),
])  # fmt: skip
def test_other_weights_and_other_layouts_are_refused(model: str, layout: str, why: str) -> None:
    held = Held()
    with serving(held) as address:
        link = peer(address, model, layout)
        with pytest.raises(PeerAway, match=why):
            link.fetch(1, 0, [memoryview(part) for part in places()])
        link.close()
    assert held.reads == 0


def test_a_worker_that_gives_nothing_and_one_that_is_gone_are_told() -> None:
    with serving(None) as address:
        link = peer(address)
        with pytest.raises(PeerAway, match="UNIMPLEMENTED"):
            link.fetch(1, 0, [memoryview(part) for part in places()])
        link.close()
    link = peer(address)
    with pytest.raises(PeerAway, match="UNAVAILABLE"):
        link.fetch(1, 0, [memoryview(part) for part in places()])
    link.close()


@pytest.mark.parametrize("request_frame", [
    b"", b"nonsense", bytes(25),
    struct.pack("<IIIQI", 1, 0, 9, 0, 4),
    struct.pack("<IIIQI", 1, 0, 0, 1 << 60, 4),
    struct.pack("<IIIQI", 1, 0, 1, 0, 8),
    struct.pack("<IIIQI", 1, 0, 0, 0, PIECE_BYTES + 1),
])  # fmt: skip
def test_calls_that_make_no_sense_get_no_bytes_and_harm_nobody(request_frame: bytes) -> None:
    metadata = ((MODEL_KEY, MODEL), (LAYOUT_KEY, "plain"))
    with serving(Held()) as address, grpc.insecure_channel(address) as channel:
        call = channel.unary_unary(PIECE_PATH)
        assert call(request_frame, 10, metadata) == b""
        assert call(struct.pack("<IIIQI", 1, 1, 1, 0, 7), 10, metadata) == bytes([9]) * 7
