"""Experts from one worker to another: pieces of their weights as the holder has them in memory, over the workers' own
gRPC server and its mutual TLS.

Each piece is a call of its own, so that nothing is kept at the holder between two of them, and a caller never waits
longer than for one piece.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import grpc

from cluster.config import DispatchConfig
from cluster.tls.grpc_credentials import ExpertChannels
from routing.tokens.channel import LAYOUT_KEY, MODEL_KEY, PIECE_PATH, channel_options
from routing.tokens.frame_server import Refusal, Stream

logger = logging.getLogger(__name__)

PIECE_BYTES = 1 << 20  # at most; 0.1-0.2 ms of the holder's time
_REQUEST = struct.Struct("<IIIQI")  # layer, expert, part, offset, length
_IN_FLIGHT = 4  # pieces of one caller: the next one is copied and sent while this one is written
_TIMEOUT_S = 5.0  # of a piece

Admit = Callable[[Mapping[str, str], Mapping[str, Sequence[bytes]]], "Refusal | None"]


class PieceSource(Protocol):
    """What a worker gives to others."""

    @property
    def layout(self) -> str:
        """How it holds experts: only who holds them in the same way can use them."""

    def read(self, layer: int, expert: int, part: int, offset: int, length: int) -> bytes:
        """Return bytes of one part (gate_up, down, or their scales) of an expert; none if it is not held here, or not
        any more. Raises ValueError if there is no such part, or not so many bytes in it.
        """


class PieceHandler:
    """Answers calls for pieces. The answer without bytes means that the expert is not held here."""

    def __init__(self, source: PieceSource, admit: Admit) -> None:
        """`admit`: who may call at all."""
        self._source, self._admit = source, admit

    def admit(self, metadata: Mapping[str, str], auth_context: Mapping[str, Sequence[bytes]]) -> Refusal | None:
        """Refuse also callers who hold experts in another way."""
        if (refusal := self._admit(metadata, auth_context)) is not None:
            return refusal
        theirs, ours = metadata.get(LAYOUT_KEY), self._source.layout
        if theirs != ours:
            text = f"this worker holds experts as {ours}, the caller as {theirs}"
            return Refusal(grpc.StatusCode.FAILED_PRECONDITION, text)
        return None

    def opened(self, stream: Stream) -> None:
        """Nothing is kept."""

    def gone(self, stream: Stream) -> None:
        """Nothing is kept."""

    def received(self, stream: Stream, frame: bytes) -> None:
        """Answer with the bytes that the frame asks for."""
        piece = b""
        try:
            layer, expert, part, offset, length = _REQUEST.unpack(frame)
            if length <= PIECE_BYTES:
                piece = self._source.read(layer, expert, part, offset, length)
        except (struct.error, ValueError) as error:
            logger.warning("a call for a piece of an expert was not understood: %s", error)
        stream.answer(piece, len(frame))


class PeerAway(Exception):
    """Nothing comes from this worker any more; the message says why."""


class ExpertPeer:
    """Another worker, of which experts can be had. For one thread at a time."""

    def __init__(
        self, address: str, model_id: str, layout: str, settings: DispatchConfig, channels: ExpertChannels | None
    ) -> None:
        """`channels`: mutual TLS; plain TCP without. Connects when something is asked for."""
        self.address = address
        options: list[tuple[str, str | int]] = [*channel_options(settings)]
        if channels is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, channels.credentials(), [*options, *channels.options()])
        self._call = self._channel.unary_unary(PIECE_PATH)
        self._metadata = ((MODEL_KEY, model_id), (LAYOUT_KEY, layout))

    def fetch(self, layer: int, expert: int, parts: Sequence[memoryview]) -> bool:
        """Fill `parts` with an expert. Returns False if it is not held there; what was written then is of no use.
        Raises PeerAway.
        """
        under_way: deque[tuple[grpc.Future, memoryview]] = deque()
        try:
            for number, part in enumerate(parts):
                for offset in range(0, len(part), PIECE_BYTES):
                    place = part[offset : offset + PIECE_BYTES]
                    request = _REQUEST.pack(layer, expert, number, offset, len(place))
                    under_way.append((self._call.future(request, _TIMEOUT_S, self._metadata), place))
                    if len(under_way) == _IN_FLIGHT and not _finish(*under_way.popleft()):
                        return False
            while under_way:
                if not _finish(*under_way.popleft()):
                    return False
        except grpc.RpcError as error:
            raise PeerAway(f"{error.code().name}: {error.details()}") from None
        finally:
            for call, _ in under_way:
                call.cancel()
        return True

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _finish(call: grpc.Future, place: memoryview) -> bool:
    piece = call.result()
    if len(piece) != len(place):
        return False
    place[:] = piece
    return True
