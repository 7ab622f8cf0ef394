"""A worker's link for several threads, each of which waits for its own replies."""

from __future__ import annotations

import threading
import time

import grpc

from cluster.config import DispatchConfig
from cluster.errors import DeepsplitError, FrameError, WorkerLost
from cluster.tls.grpc_credentials import ExpertChannels
from routing.tokens.link import WorkerLink
from routing.tokens.wire import DispatchReply, ErrorReply, decode_reply, peek_frame_id


class SharedLink(WorkerLink):
    """Whichever thread waits first reads the stream for all; the others sleep until their reply is there."""

    def __init__(
        self, address: str, model_id: str, settings: DispatchConfig, channels: ExpertChannels | None = None
    ) -> None:
        super().__init__(address, model_id, settings, channels)
        self._turn = threading.Condition()
        self._reading = False  # some thread reads the stream
        self._awaited: set[int] = set()  # frame ids of which somebody wants the reply
        self._broken: DeepsplitError | None = None

    @property
    def idle(self) -> bool:
        """Whether nobody waits for a reply."""
        return not self._awaited

    def send(self, frame: bytes) -> None:
        """Queue one frame; gRPC's own thread writes it."""
        self._awaited.add(peek_frame_id(frame))
        super().send(frame)

    def forget(self, frame_id: int) -> None:
        """The reply to this frame will not be asked for: it is thrown away when it comes."""
        with self._turn:
            self._awaited.discard(frame_id)
            self._replies.pop(frame_id, None)

    def receive(self, frame_id: int, timeout_s: float) -> DispatchReply:
        """Return the reply to the frame `frame_id`, whatever else arrives before it.

        Raises WorkerLost when the stream breaks or nothing comes in `timeout_s`, or the worker's own error.
        """
        deadline = time.monotonic() + timeout_s
        with self._turn:
            while frame_id not in self._replies:
                if self._broken is not None:
                    self._awaited.discard(frame_id)
                    raise type(self._broken)(str(self._broken))
                if not self._reading:
                    self._reading = True
                    break
                if not self._turn.wait(deadline - time.monotonic()):
                    raise WorkerLost(f"expert worker {self.address} did not answer within {timeout_s:.1f} s")
            else:
                return self._take(frame_id)
        self._deadline = deadline
        broken: DeepsplitError | None = None
        try:
            while True:
                reply = decode_reply(next(self._call))
                with self._turn:
                    if reply.frame_id in self._awaited:
                        self._replies[reply.frame_id] = reply
                    if reply.frame_id == frame_id:
                        break
                    self._turn.notify_all()
        except StopIteration:
            broken = WorkerLost(f"expert worker {self.address} closed the stream")
        except grpc.RpcError as error:
            broken = self._explain(error, timeout_s)
        except FrameError as error:
            broken = WorkerLost(f"expert worker {self.address} sent a broken reply: {error}")
        finally:
            with self._turn:
                self._deadline = float("inf")
                self._reading = False
                self._broken = broken
                self._turn.notify_all()
                self._awaited.discard(frame_id)
        if broken is not None:
            raise broken
        with self._turn:
            return self._take(frame_id)

    def _take(self, frame_id: int) -> DispatchReply:
        self._awaited.discard(frame_id)
        reply = self._replies.pop(frame_id)
        if isinstance(reply, ErrorReply):
            raise reply.error
        return reply
