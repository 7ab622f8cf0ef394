"""One attention process's stream to one expert worker."""

from __future__ import annotations

import threading
import time
from collections import deque

import grpc

from cluster.config import DispatchConfig
from cluster.errors import DeepsplitError, FrameError, WorkerLost, WorkerSilent, WorkerUnusable
from cluster.tls.grpc_credentials import ExpertChannels, handshake_hint
from routing.tokens.channel import METHOD_PATH, MODEL_KEY, channel_options
from routing.tokens.frame_stream import Ended, Event, FrameStream, Nothing, Received, Sent
from routing.tokens.link_poller import LinkPoller
from routing.tokens.wire import DispatchReply, ErrorReply, decode_reply, peek_frame_id

# A frame of this size or more fills socket buffers (Linux: 16 KiB to 4 MiB out, 128 KiB to 6 MiB in), so it stops half-
# way unless somebody goes on with it while its sender does other work.
_LARGE_BYTES = 128 << 10
# A worker ends the stream in these ways if it serves another model, or no method of this name.
_UNUSABLE = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNIMPLEMENTED)


class WorkerLink:
    """A long-lived bidirectional stream. Thread-safe: several threads may have frames in flight.

    The threads that wait for replies do the stream's work themselves, so a round trip wakes nobody but its caller. One
    of them at a time polls and files what comes for the others, who sleep until it does or until it leaves and one of
    them takes over. While nobody waits, small frames lie in the sockets' buffers, `tend` answers pings a few times a
    second, and a LinkPoller goes on with large frames.

    A link that broke stays broken: its owner drops it and opens another.
    """

    def __init__(
        self,
        address: str,
        model_id: str,
        settings: DispatchConfig,
        channels: ExpertChannels | None = None,
        poller: LinkPoller | None = None,
    ) -> None:
        """`channels`: mutual TLS; plain TCP without. `poller`: what many links share; one of its own without."""
        self.address = address
        self._secure = channels is not None
        self._poller = LinkPoller() if poller is None else poller
        options: list[tuple[str, str | int]] = [*channel_options(settings)]
        if channels is not None:
            options += channels.options()
        self._stream = FrameStream(
            address, METHOD_PATH, ((MODEL_KEY, model_id),), options, channels.credentials() if channels else None
        )
        self._lock = threading.Lock()  # of all below
        self._changed = threading.Condition(self._lock)  # a reply was filed, or nobody polls any more
        self._polled = False  # whether a thread is in the stream's `next`
        self._attended = 0  # threads in the stream's `poll`
        self._poll_until = float("inf")  # monotonic seconds; when that thread gives up
        self._waiting = 0  # threads in `receive`
        self._sending = False
        self._reading = False
        self._outbox: deque[bytes] = deque()  # gRPC takes one frame at a time
        self._unanswered: set[int] = set()  # frames sent and not forgotten; replies to others are dropped
        self._replies: dict[int, DispatchReply | ErrorReply] = {}
        self._broken: DeepsplitError | None = None
        self._closed = False

    def send(self, frame: bytes) -> None:
        """Send one frame, or queue it behind the one that is being sent. Errors are the receiver's."""
        with self._lock:
            self._unanswered.add(peek_frame_id(frame))
            self._outbox.append(frame)
            self._work_on()
            unattended = not self._polled and (len(frame) >= _LARGE_BYTES or bool(self._outbox))
        if unattended:
            self._poller.attend(self)

    def receive(self, frame_id: int, timeout_s: float, give_up: bool = True) -> DispatchReply:
        """Return the reply to the frame `frame_id`, whatever else arrives before it.

        Raises WorkerLost or WorkerUnusable when the stream breaks, WorkerSilent when the reply does not come in
        `timeout_s` (0 or less: it must have come already), or the worker's own error. A reply that comes after all is
        dropped, unless the caller does not `give_up`: it may ask again.
        """
        deadline = time.monotonic() + timeout_s
        looked = False
        with self._lock:
            self._waiting += 1
            try:
                while frame_id not in self._replies:
                    if self._broken is not None:
                        raise type(self._broken)(str(self._broken))
                    if (left_s := deadline - time.monotonic()) <= 0:
                        if looked or self._polled:
                            raise WorkerSilent(f"expert worker {self.address} did not answer in time")
                        looked = True
                        self._look()  # it may lie in the socket: nobody read while the caller did other work
                    elif self._polled:
                        self._changed.wait(left_s)
                    else:
                        self._poll(deadline)
                reply = self._replies[frame_id]
            finally:
                self._waiting -= 1
                if give_up or frame_id in self._replies:
                    self._unanswered.discard(frame_id)
                    self._replies.pop(frame_id, None)
                unattended = False
                if not self._polled:
                    self._changed.notify()
                    unattended = not self._waiting and bool(self._outbox) and self._broken is None
        if unattended:  # frames of threads that do other work
            self._poller.attend(self)
        if isinstance(reply, ErrorReply):
            raise reply.error
        return reply

    def forget(self, frame_id: int) -> None:
        """Drop the reply to a frame that nobody will ask for, now or when it comes."""
        with self._lock:
            self._unanswered.discard(frame_id)
            self._replies.pop(frame_id, None)

    @property
    def idle(self) -> bool:
        """Whether no reply is awaited."""
        return not self._unanswered

    @property
    def broken(self) -> DeepsplitError | None:
        """Why the link is of no use any more."""
        return self._broken

    def tend(self, now: float) -> None:
        """Let a thread give up whose `receive` has passed its deadline; where no thread waits, answer pings and notice
        a peer that went away. The client's watchdog calls this, more often than gRPC's pings time out.
        """
        with self._lock:
            late = now > self._poll_until
            if late and not self._closed:
                self._stream.wake()
        if not late:
            self.attend(0.0)

    def attend(self, seconds: float) -> bool:
        """Go on with what can go on while no thread waits. Returns whether there may be more: replies are outstanding.
        """
        with self._lock:
            if self._polled or self._closed or self._broken is not None:
                return False
            self._attended += 1
        try:
            self._stream.poll(seconds)
        finally:
            with self._lock:
                self._attended -= 1
                if not self._polled and not self._closed and self._broken is None:  # or there is no event to come
                    self._stream.wake()  # comes after all that is done already
                    while not isinstance(event := self._stream.next(), Nothing):
                        self._handle(event)
                if self._closed:
                    self._changed.notify_all()
        return not self._polled and not self.idle and self._broken is None

    def close(self) -> None:
        """End the stream and the connection; whoever waits for a reply gets WorkerLost."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._break(WorkerLost(f"expert worker {self.address}: the link was closed"))
            self._stream.cancel("closed")
            while self._polled or self._attended:
                self._changed.wait()
            self._stream.close()

    # --- under the lock ---

    def _look(self) -> None:
        self._lock.release()
        try:
            self.attend(0.0)
        finally:
            self._lock.acquire()

    def _poll(self, deadline: float) -> None:
        self._polled, self._poll_until = True, deadline
        self._lock.release()
        try:
            event = self._stream.next()
        except BaseException:
            self._lock.acquire()
            self._break(WorkerLost(f"expert worker {self.address}: the thread that read from it was interrupted"))
            raise
        else:
            self._lock.acquire()
        finally:
            self._polled, self._poll_until = False, float("inf")
            if self._closed:
                self._changed.notify_all()
        self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Sent):
            self._sending = False
        elif isinstance(event, Received):
            self._reading = False
            self._file(event.frame)
        elif isinstance(event, Ended):
            self._break(self._explain(event))
        self._work_on()

    def _work_on(self) -> None:
        if self._broken is not None:
            return
        if not self._reading:
            self._reading = True
            self._stream.read()
        if not self._sending and self._outbox:
            self._sending = True
            self._stream.send(self._outbox.popleft())

    def _file(self, frame: bytes) -> None:
        try:
            reply = decode_reply(frame)
        except FrameError as error:
            self._break(WorkerUnusable(f"expert worker {self.address} sent a reply that is none: {error}"))
            return
        if reply.frame_id in self._unanswered:
            self._unanswered.remove(reply.frame_id)
            self._replies[reply.frame_id] = reply
            if self._waiting > 1:
                self._changed.notify_all()

    def _break(self, error: DeepsplitError) -> None:
        if self._broken is None:
            self._broken = error
        self._outbox.clear()
        self._stream.cancel("broken")
        self._changed.notify_all()

    def _explain(self, end: Ended) -> DeepsplitError:
        if end.code is grpc.StatusCode.OK:
            return WorkerLost(f"expert worker {self.address} closed the stream")
        if end.code in _UNUSABLE:
            return WorkerUnusable(f"expert worker {self.address} refused the stream: {end.details}")
        hint = handshake_hint(end.details, self._secure)
        return WorkerLost(f"expert worker {self.address}{hint}: {end.code.name}: {end.details}")
