"""gRPC streams of frames, served by whichever thread polls: grpcio's own layer below its Python server.

`grpc.server` has a thread that polls and one per stream, so each message costs several wake-ups, and wake-ups, not
bytes, are what a small dispatch costs. Its lower layer, `grpc._cython.cygrpc`, lets one thread poll, compute and
answer. It is private to grpcio: all that the server side uses of it is in this file, and `probe` checks it at start.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from grpc._cython import cygrpc

from routing.tokens.grpcio_probe import require

logger = logging.getLogger(__name__)

# A stream is read on while it has fewer requests and bytes than this unanswered, so that a client can neither fill the
# memory nor wait for a round trip per frame. One frame more may be on its way: dispatch.max_message_mib bounds it.
READ_AHEAD_FRAMES = 32
READ_AHEAD_BYTES = 4 << 20

_NEEDED = {
    cygrpc: ("CompletionQueue", "CompletionType", "ReceiveCloseOnServerOperation", "ReceiveMessageOperation",
             "SendInitialMetadataOperation", "SendMessageOperation", "SendStatusFromServerOperation", "Server",
             "StatusCode", "auth_context"),
    getattr(cygrpc, "Server", None): ("add_http2_port", "cancel_all_calls", "destroy", "register_completion_queue",
                                      "request_call", "shutdown", "start"),
    getattr(cygrpc, "Call", None): ("start_server_batch",),
    getattr(cygrpc, "CompletionQueue", None): ("poll",),
}  # fmt: skip


def probe() -> None:
    """Raise StartupError if the installed grpcio lacks what this file uses."""
    require(_NEEDED, "the expert workers' server")


@dataclass(frozen=True)
class Refusal:
    """Why a stream is not taken."""

    code: grpc.StatusCode
    details: str


class StreamHandler(Protocol):
    """What is done with streams. Called by the thread that polls."""

    def admit(self, metadata: Mapping[str, str], auth_context: Mapping[str, Sequence[bytes]]) -> Refusal | None:
        """Say whether a new stream is taken."""

    def opened(self, stream: Stream) -> None:
        """A stream was taken."""

    def received(self, stream: Stream, frame: bytes) -> None:
        """A frame came. It must be answered with exactly one `Stream.answer`."""

    def gone(self, stream: Stream) -> None:
        """The stream has ended; what is answered from now on reaches nobody."""


class Stream:
    """One client's stream. `answer` may be called by any thread, the rest is called by the thread that polls."""

    def __init__(self, call: Any, handler: StreamHandler, forget: Callable[[Stream], None]) -> None:
        self._call = call
        self._handler = handler
        self._forget = forget
        self._lock = threading.Lock()  # of all below
        self._open = True  # until the call has ended
        self._half_closed = False  # the client sends no more
        self._reading = False
        self._sending: int | None = None  # size of the request whose answer is being sent
        self._outbox: deque[tuple[bytes, int]] = deque()  # answers, with their requests' sizes
        self._frames = 0  # not answered yet
        self._bytes = 0

    def begin(self) -> None:
        """Take the stream and read its first frame."""
        self._call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_close)
        self._call.start_server_batch((cygrpc.SendInitialMetadataOperation((), 0),), _ignore)
        with self._lock:
            self._read_on()

    def answer(self, frame: bytes, request_bytes: int) -> None:
        """Send the answer to a request of that size. Returns at once; answers are sent in this order."""
        with self._lock:
            self._outbox.append((frame, request_bytes))
            self._send_next()

    @property
    def sending(self) -> bool:
        """Whether an answer is still on its way out."""
        return self._sending is not None

    def _send_next(self) -> None:
        # gRPC takes one message at a time.
        if self._open and self._sending is None and self._outbox:
            frame, self._sending = self._outbox.popleft()
            self._call.start_server_batch((cygrpc.SendMessageOperation(frame, 0),), self._on_sent)

    def _read_on(self) -> None:
        if (
            self._open
            and not self._reading
            and not self._half_closed
            and self._frames < READ_AHEAD_FRAMES
            and self._bytes < READ_AHEAD_BYTES
        ):
            self._reading = True
            self._call.start_server_batch((cygrpc.ReceiveMessageOperation(0),), self._on_message)

    def _end_if_done(self) -> None:
        if self._open and self._half_closed and not self._frames:
            operation = cygrpc.SendStatusFromServerOperation((), cygrpc.StatusCode.ok, b"", 0)
            self._call.start_server_batch((operation,), _ignore)

    def _on_message(self, event: Any) -> None:
        frame: bytes | None = event.batch_operations[0].message()
        with self._lock:
            self._reading = False
            if frame is None:  # the client has half-closed, or is gone
                self._half_closed = True
                self._end_if_done()
                return
            self._frames += 1
            self._bytes += len(frame)
            self._read_on()
        self._handler.received(self, frame)

    def _on_sent(self, event: Any) -> None:
        with self._lock:
            assert self._sending is not None
            self._frames -= 1
            self._bytes -= self._sending
            self._sending = None
            self._send_next()
            self._read_on()
            self._end_if_done()

    def _on_close(self, event: Any) -> None:
        with self._lock:
            self._open = False
            self._outbox.clear()
            self._call = None  # the server's shutdown waits until nobody holds the call
        self._forget(self)
        self._handler.gone(self)


def _ignore(event: Any) -> None:
    """Nothing is to be done when an operation with this tag completes."""


class FrameServer:
    """Serves methods that take frames and answer each. One thread at a time may call `poll`, any thread the rest."""

    def __init__(
        self, handlers: Mapping[str, StreamHandler], options: Sequence[tuple[str, int]], max_streams: int
    ) -> None:
        """`handlers`: by the method's path."""
        probe()
        self._handlers = {path.encode(): handler for path, handler in handlers.items()}
        self._options = tuple((key.encode(), value) for key, value in options)
        self._max_streams = max_streams
        self._streams: set[Stream] = set()
        self._queue: Any = None
        self._server: Any = None  # none before it listens and after it has ended
        self._shut_down = False
        self._ending = threading.Lock()  # of the server's shutdown and its end
        self.ended = threading.Event()  # set by `poll` once the server is shut down and every stream is gone

    def listen(self, target: str, credentials: grpc.ServerCredentials | None) -> int:
        """Bind host:port and start; returns the port. Raises RuntimeError if the port cannot be had."""
        self._queue = cygrpc.CompletionQueue()
        server = cygrpc.Server(self._options, False)
        server.register_completion_queue(self._queue)
        arguments = () if credentials is None else (credentials._credentials,)
        port: int = server.add_http2_port(target.encode(), *arguments)
        if port == 0:
            raise RuntimeError(f"failed to bind {target}")
        server.start()
        self._server = server
        self._request_call()
        return port

    def poll(self, deadline: float | None) -> bool:
        """Do what there is to do on sockets and handle one event; False if there was none.

        `deadline`: seconds of `time.time()` until which to wait for one; 0 not to wait, None for ever.
        """
        event = self._queue.poll(deadline)
        if event.completion_type is cygrpc.CompletionType.queue_timeout:
            return False
        try:
            event.tag(event)
        except Exception:  # the others' streams go on
            logger.exception("an event of the expert plane's server was not handled")
        return True

    def sending(self) -> bool:
        """Whether some answer is still on its way out, which takes somebody who polls."""
        return any(stream.sending for stream in tuple(self._streams))

    def shut_down(self) -> None:
        """Take no new stream. `ended` is set when those that there are have ended."""
        with self._ending:
            if self._server is not None and not self._shut_down:
                self._shut_down = True
                self._server.shutdown(self._queue, self._on_shutdown)

    def cut(self) -> None:
        """Break all streams that are left after `shut_down`."""
        with self._ending:
            if self._shut_down and self._server is not None:
                self._server.cancel_all_calls()

    def _request_call(self) -> None:
        with self._ending:
            if not self._shut_down:  # gRPC takes no more requests for calls then
                self._server.request_call(self._queue, self._queue, self._on_call)

    def _on_call(self, event: Any) -> None:
        if not event.success:  # the server shuts down
            return
        self._request_call()
        refusal = self._refusal(event)
        if refusal is not None:
            code = getattr(cygrpc.StatusCode, refusal.code.name.lower())
            operations = (
                cygrpc.SendInitialMetadataOperation((), 0),
                cygrpc.ReceiveCloseOnServerOperation(0),
                cygrpc.SendStatusFromServerOperation((), code, refusal.details.encode(), 0),
            )
            event.call.start_server_batch(operations, _ignore)
            return
        handler = self._handlers[event.call_details.method]
        stream = Stream(event.call, handler, self._streams.discard)
        self._streams.add(stream)
        handler.opened(stream)
        stream.begin()

    def _refusal(self, event: Any) -> Refusal | None:
        if self._shut_down:  # it had come before, but nobody had looked
            return Refusal(grpc.StatusCode.UNAVAILABLE, "this worker is being stopped")
        handler = self._handlers.get(event.call_details.method)
        if handler is None:
            return Refusal(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if len(self._streams) >= self._max_streams:
            text = f"this worker has {self._max_streams} streams already: raise dispatch.max_streams"
            return Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        identity = {key.decode(): value for key, value in (cygrpc.auth_context(event.call) or {}).items()}
        return handler.admit(dict(event.invocation_metadata), identity)

    def _on_shutdown(self, event: Any) -> None:
        with self._ending:  # gRPC may still be inside of what caused this event
            self._server.destroy()
            self._server = None
        self.ended.set()
