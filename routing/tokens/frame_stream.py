"""The client's end of a gRPC stream of frames, worked by the threads that send and receive: no thread lies between.

grpcio's synchronous stream has a thread that takes requests from an iterator and one that polls completions, so a round
trip wakes several. Its lower layer, `grpc._cython.cygrpc`, lets the calling thread do both. It is private to grpcio:
all that the client side uses of it is in this file, and `probe` checks it before the first stream.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from time import time
from typing import Any

import grpc
from grpc._cython import cygrpc

from routing.tokens.grpcio_probe import require

_NEEDED = {
    cygrpc: ("Channel", "ReceiveInitialMetadataOperation", "ReceiveMessageOperation", "ReceiveStatusOnClientOperation",
             "SegregatedCall", "SendInitialMetadataOperation", "SendMessageOperation"),
    getattr(cygrpc, "Channel", None): (
        "check_connectivity_state", "close", "segregated_call", "watch_connectivity_state",
    ),
    getattr(cygrpc, "SegregatedCall", None): ("cancel", "next_event", "operate"),
}  # fmt: skip
_CODES = {member.value[0]: member for member in grpc.StatusCode}


def probe() -> None:
    """Raise StartupError if the installed grpcio lacks what this file uses."""
    require(_NEEDED, "the expert plane's client")


@dataclass(frozen=True)
class Sent:
    """The frame that was being sent has left; the next one may follow."""


@dataclass(frozen=True)
class Received:
    """A frame came."""

    frame: bytes


@dataclass(frozen=True)
class Ended:
    """The stream is over: by the peer, the connection, or `cancel`."""

    code: grpc.StatusCode
    details: str


@dataclass(frozen=True)
class Nothing:
    """Somebody called `wake`, or something completed that asks for no action."""


Event = Sent | Received | Ended | Nothing
_SENT, _NOTHING = Sent(), Nothing()


class FrameStream:
    """One stream over one connection. gRPC takes one `send` and one `read` at a time; `next` tells when they are done.

    One thread at a time may be in `next`, which is also what moves bytes over the socket; any thread may call the rest
    meanwhile. It must be closed.
    """

    def __init__(
        self,
        address: str,
        method_path: str,
        metadata: Sequence[tuple[str, str]],
        options: Sequence[tuple[str, str | int]],
        credentials: grpc.ChannelCredentials | None,
    ) -> None:
        """Starts to connect. A refused connection ends the stream at once. Raises StartupError as `probe` does."""
        probe()
        # Not wait-for-ready, no deadline of its own; tags are what `next` gets back.
        started: tuple[tuple[tuple[Any, ...], object], ...] = (
            ((cygrpc.SendInitialMetadataOperation(tuple(metadata), 0),), None),
            ((cygrpc.ReceiveStatusOnClientOperation(0),), Ended),
            ((cygrpc.ReceiveInitialMetadataOperation(0),), None),
        )
        self._channel = cygrpc.Channel(
            address.encode(), tuple(options), None if credentials is None else credentials._credentials
        )
        self._call = self._channel.segregated_call(
            0, method_path.encode(), None, None, tuple(metadata), None, started, None
        )
        self._count = threading.Lock()
        self._due = len(started)  # batches that `next` has not returned yet; gRPC frees the call with the last one

    def send(self, frame: bytes) -> None:
        """Start to send; `Sent` follows. What does not fit into the socket's buffer goes as threads are in `next`."""
        self._operate((cygrpc.SendMessageOperation(frame, 0),), Sent)

    def read(self) -> None:
        """Ask for one frame; `Received` follows, or `Ended` alone."""
        self._operate((cygrpc.ReceiveMessageOperation(0),), Received)

    def wake(self) -> None:
        """Let the thread in `next`, or the next to call it, come back with `Nothing`, after what is done already."""
        self._operate((), Nothing)

    def next(self) -> Event:
        """Wait for the next event, without a deadline: `wake` and `cancel` end the wait. Not to be called after
        `close`."""
        try:
            event = self._call.next_event()
        except BaseException:  # a signal's handler raised; gRPC has given the call up
            self._due = 0
            raise
        with self._count:
            self._due -= 1
        if event.tag is Sent:
            return _SENT
        if event.tag is Received:
            frame = event.batch_operations[0].message()
            return _NOTHING if frame is None else Received(frame)
        if event.tag is Ended:
            status = event.batch_operations[0]
            return Ended(_CODES.get(status.code(), grpc.StatusCode.UNKNOWN), status.details())
        return _NOTHING

    def poll(self, seconds: float) -> None:
        """Move bytes and answer pings for at most so long, beside a thread in `next` or without one; takes no event.

        It waits for the connection's state to change, because gRPC works on the socket meanwhile.
        """
        self._channel.watch_connectivity_state(self._channel.check_connectivity_state(False), time() + seconds)

    def cancel(self, details: str) -> None:
        """End the stream; everything that is being waited for completes."""
        self._call.cancel(grpc.StatusCode.CANCELLED.value[0], details)

    def close(self) -> None:
        """End stream and connection. Nobody may be in `next`."""
        self.cancel("closed")
        while self._due:
            self.next()
        self._channel.close(grpc.StatusCode.CANCELLED.value[0], "closed")

    def _operate(self, operations: tuple[Any, ...], tag: object) -> None:
        with self._count:
            self._due += 1  # before its event can come
        started = False  # it stays so when the call is over
        try:
            started = self._call.operate(operations, tag)
        finally:
            if not started:
                with self._count:
                    self._due -= 1
