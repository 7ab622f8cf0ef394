"""The expert side of the expert plane: it takes requests from streams, computes them by turns, and replies."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

import grpc
import torch

from cluster.addresses import bracketed
from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import DeepsplitError, FrameError, StartupError, WorkerFailing
from cluster.model.identity import same_model
from cluster.tls.grpc_credentials import expert_server_credentials, peer_is
from monitoring.expert_meter import ExpertMeter
from routing.tokens.batcher import Batcher, QueuedRequest, Turn
from routing.tokens.channel import METHOD_PATH, MODEL_KEY, PIECE_PATH, channel_options
from routing.tokens.expert_pieces import PieceHandler, PieceSource
from routing.tokens.fence import Fence
from routing.tokens.frame_server import FrameServer, Refusal, Stream, StreamHandler
from routing.tokens.kept_memory import keep_freed_memory
from routing.tokens.turn_runner import ComputeExperts, TurnRunner
from routing.tokens.turn_threads import TurnThreads
from routing.tokens.wire import (
    DispatchReply,
    decode_request,
    encode_error,
    encode_reply,
    peek_frame_id,
    peek_request_ids,
)

logger = logging.getLogger(__name__)

_END_S = 2.0  # how long cut streams and the threads may take to end


class ExpertServer:
    """A gRPC server for one expert worker: over mutual TLS with `tls`, plain without."""

    def __init__(
        self,
        experts: ComputeExperts,
        hidden_size: int,
        model_id: str,
        settings: DispatchConfig,
        tls: InternalTlsConfig | None = None,
        meter: ExpertMeter | None = None,
        pieces: PieceSource | None = None,
    ) -> None:
        """`pieces`: what other workers may have of this one's weights."""
        self._meter = meter
        self._hidden_size = hidden_size
        self._model_id = model_id
        self._tls = tls
        self._batcher = Batcher(settings.batch_rows)
        self._fence = Fence(settings.call_timeout_s)
        self._runner = TurnRunner(experts, self._finish, time.monotonic, self._fence, meter)
        handlers: dict[str, StreamHandler] = {METHOD_PATH: self}
        if pieces is not None:
            handlers[PIECE_PATH] = PieceHandler(pieces, self.admit)
        self._frames = FrameServer(handlers, channel_options(settings), settings.max_streams)
        self._threads = TurnThreads(self._batcher, self._run, self._frames, settings.keepalive_timeout_s / 4)
        self._started = False

    def start(self, host: str, port: int = 0) -> str:
        """Listen; returns host:port. Port 0 takes a free one. Raises StartupError.

        Sets the C library's allocator, for the whole process, to keep what is freed.
        """
        target = bracketed(host)
        credentials = None if self._tls is None else expert_server_credentials(self._tls)
        try:
            bound = self._frames.listen(f"{target}:{port}", credentials)
        except RuntimeError as error:
            raise StartupError(f"expert worker cannot listen on {target}:{port}: {error}; see experts.host") from None
        self._started = True
        keep_freed_memory()
        self._threads.start()
        return f"{target}:{bound}"

    def stop(self, grace_s: float) -> None:
        """Take no new stream, let running ones end for `grace_s`, then break them."""
        if not self._started:
            return
        self._frames.shut_down()
        if not self._frames.ended.wait(grace_s):
            self._frames.cut()
            if not self._frames.ended.wait(_END_S):
                logger.warning("the expert plane's streams did not end within %.0f s", _END_S)
        self._threads.join(_END_S)

    def waiting(self) -> int:
        """Return the number of requests in the queue."""
        return len(self._batcher)

    def busy_s(self) -> float:
        """Return the seconds in which experts were computed, so far."""
        return self._runner.busy_s

    def failure(self) -> str | None:
        """Return why this worker must be replaced, None while it is well. Refuses what waits if it must."""
        reason = self._fence.look(self._threads.computing_s())
        if reason is not None:
            self._refuse_waiting(reason)
        return reason

    def admit(self, metadata: Mapping[str, str], auth_context: Mapping[str, Sequence[bytes]]) -> Refusal | None:
        """Refuse callers of another name or model."""
        if self._tls is not None and not peer_is(self._tls.server_name, auth_context):
            return Refusal(
                grpc.StatusCode.UNAUTHENTICATED,
                f"the caller's certificate is not for {self._tls.server_name} (internal_tls.server_name)",
            )
        theirs = metadata.get(MODEL_KEY)
        if theirs is None or not same_model(self._model_id, theirs):
            return Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker serves model {self._model_id}, the caller {theirs}: one cluster, one checkpoint",
            )
        return None

    def opened(self, stream: Stream) -> None:
        """Count a stream."""
        if self._meter is not None:
            self._meter.metrics.streams.inc()

    def gone(self, stream: Stream) -> None:
        """Nobody waits for this stream's requests any more."""
        self._threads.drop_owner(stream)
        if self._meter is not None:
            self._meter.metrics.streams.dec()

    def received(self, stream: Stream, frame: bytes) -> None:
        """Queue a request, or refuse a frame that is none."""
        arrived = time.monotonic()
        try:
            if (reason := self._fence.look(self._threads.computing_s())) is not None:
                raise WorkerFailing(reason, fenced=True)
            request = decode_request(frame, self._hidden_size)
            self._threads.add(QueuedRequest(request, stream, len(frame), arrived))
        except Exception as error:  # the worker lives on, whatever a frame holds
            refusal = error if isinstance(error, DeepsplitError) else FrameError(f"frame not understood: {error!r}")
            if refusal is not error:
                refusal.__cause__ = error
            stream.answer(self._refused(peek_frame_id(frame), peek_request_ids(frame), refusal), len(frame))

    def _run(self, turn: Turn) -> None:
        self._runner.run(turn)
        if self._fence.reason is not None:
            self._refuse_waiting(self._fence.reason)

    def _refuse_waiting(self, reason: str) -> None:
        for work in self._threads.drop_untouched():
            self._finish(work, WorkerFailing(reason, fenced=True))

    def _finish(self, work: QueuedRequest, result: torch.Tensor | DeepsplitError) -> None:
        request = work.request
        if isinstance(result, DeepsplitError):
            self._threads.drop(work)
            frame = self._refused(request.frame_id, request.request_ids, result)
        else:
            queue_us, compute_us = int((work.started - work.arrived) * 1e6), int(work.compute_s * 1e6)
            frame = encode_reply(
                DispatchReply(request.frame_id, request.epoch, request.layer, queue_us, compute_us, result)
            )
        work.owner.answer(frame, work.frame_bytes)

    def _refused(self, frame_id: int, request_ids: str, error: DeepsplitError) -> bytes:
        bug = error.__cause__
        level = logging.ERROR if bug else logging.WARNING
        logger.log(
            level, "request not computed: %s", error, exc_info=bug, extra={"fields": {"request_id": request_ids}}
        )
        if self._meter is not None:
            self._meter.failed(error.outcome)
        return encode_error(frame_id, error)
