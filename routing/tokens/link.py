"""One attention process's stream to one expert worker."""

from __future__ import annotations

import time
from queue import SimpleQueue

import grpc

from cluster.config import DispatchConfig
from cluster.errors import DeepsplitError, FrameError, WorkerLost
from cluster.tls.grpc_credentials import ExpertChannels, handshake_hint
from routing.tokens.channel import METHOD_PATH, MODEL_KEY, channel_options
from routing.tokens.wire import DispatchReply, ErrorReply, decode_reply


class WorkerLink:
    """A long-lived bidirectional stream. Not thread-safe: the client calls it under its lock.

    The thread that sends also receives. gRPC's synchronous Python stream has threads of its own behind it (one takes
    frames from the queue, one polls completions), so a round trip still wakes several of them.

    A link that broke stays broken: its owner drops it and opens another.
    """

    def __init__(
        self, address: str, model_id: str, settings: DispatchConfig, channels: ExpertChannels | None = None
    ) -> None:
        """`channels`: mutual TLS; plain TCP without."""
        self.address = address
        self._secure = channels is not None
        self._deadline = float("inf")  # monotonic seconds; read by the client's watchdog thread
        self._timed_out = False
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._replies: dict[int, DispatchReply | ErrorReply] = {}
        if channels is None:
            self._channel = grpc.insecure_channel(address, options=channel_options(settings))
        else:
            options = [*channel_options(settings), *channels.options()]
            self._channel = grpc.secure_channel(address, channels.credentials(), options=options)
        # No (de)serialisers: frames are bytes already. Not wait-for-ready: a refused connection fails at once.
        dispatch = self._channel.stream_stream(METHOD_PATH)
        self._call = dispatch(iter(self._outbox.get, None), metadata=((MODEL_KEY, model_id),))

    def send(self, frame: bytes) -> None:
        """Queue one frame; gRPC's own thread writes it."""
        self._outbox.put(frame)

    def receive(self, frame_id: int, timeout_s: float) -> DispatchReply:
        """Return the reply to the frame `frame_id`, whatever else arrives before it.

        Raises WorkerLost when the stream breaks or nothing comes in `timeout_s`, or the worker's own error.
        """
        self._deadline = time.monotonic() + timeout_s
        try:
            while frame_id not in self._replies:
                reply = decode_reply(next(self._call))
                self._replies[reply.frame_id] = reply
        except StopIteration:
            raise WorkerLost(f"expert worker {self.address} closed the stream") from None
        except grpc.RpcError as error:
            raise self._explain(error, timeout_s) from None
        except FrameError as error:
            raise WorkerLost(f"expert worker {self.address} sent a broken reply: {error}") from None
        finally:
            self._deadline = float("inf")
        reply = self._replies.pop(frame_id)
        if isinstance(reply, ErrorReply):
            raise reply.error
        return reply

    def _explain(self, error: grpc.RpcError, timeout_s: float) -> DeepsplitError:
        if self._timed_out:
            return WorkerLost(f"expert worker {self.address} did not answer within {timeout_s:.1f} s")
        code, details = error.code(), error.details()
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return FrameError(f"expert worker {self.address} refused the stream: {details}")
        hint = handshake_hint(details, self._secure)
        return WorkerLost(f"expert worker {self.address}{hint}: {code.name}: {details}")

    def expire(self, now: float) -> None:
        """Break the stream if its deadline has passed. The client's watchdog thread calls this."""
        if now > self._deadline:
            self._timed_out = True
            self._call.cancel()

    def close(self) -> None:
        """End the stream and the connection."""
        self._outbox.put(None)
        self._call.cancel()
        self._channel.close()
