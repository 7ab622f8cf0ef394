"""The expert side of the expert plane: it takes requests from streams, computes them in batches per layer, and replies.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import torch

from cluster.addresses import bracketed
from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import DeepsplitError, DispatchTimeout, StartupError, WorkerLost
from cluster.tls.grpc_credentials import expert_server_credentials, peer_is
from monitoring.expert_meter import BatchSample, ExpertMeter
from routing.tokens.channel import METHOD, MODEL_KEY, SERVICE, channel_options
from routing.tokens.request_ids import join_request_ids
from routing.tokens.wire import (
    DispatchReply,
    DispatchRequest,
    decode_request,
    encode_error,
    encode_reply,
    peek_frame_id,
    peek_request_ids,
)

logger = logging.getLogger(__name__)

_MAX_STREAMS = 64  # of dispatches, one of each engine

# (layer, hidden_TH, expert_ids_TK int32 with -1 unused, weights_TK float32) -> output_TH float32
ComputeExperts = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class _QueuedRequest:
    """A request in the batcher's queue, and its result once `done`."""

    request: DispatchRequest
    arrived: float  # monotonic seconds
    done: bool = False  # written and read under the batcher's lock
    output_TH: torch.Tensor | None = None
    error: DeepsplitError | None = None
    queue_us: int = 0
    compute_us: int = 0

    @property
    def expires(self) -> float:
        return self.arrived + self.request.deadline_ms / 1000


class LayerBatcher:
    """Computes requests on one thread at a time, those of the same layer together.

    This is flat combining (Hendler, Incze, Shavit, Tzafrir: Flat Combining and the Synchronization-Parallelism
    Tradeoff, SPAA 2010): each stream's thread queues its request, and whichever thread gets the lock computes all that
    are queued. A lone request costs no thread switch, and concurrent ones share a batch.
    """

    def __init__(
        self, experts: ComputeExperts, meter: ExpertMeter | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._experts = experts
        self._meter = meter
        self._clock = clock
        self._waiting: deque[_QueuedRequest] = deque()
        self._computing = threading.Lock()
        self.busy_s = 0.0  # seconds in which experts were computed, so far

    def submit(self, request: DispatchRequest) -> _QueuedRequest:
        """Compute one request, possibly together with others. Blocks until it is done; errors are in the result."""
        work = _QueuedRequest(request, self._clock())
        self._waiting.append(work)
        # Most threads find their request done when they get the lock: the thread before them computed it.
        with self._computing:
            if not work.done:
                self._compute_waiting()
        return work

    def waiting(self) -> int:
        """Return the number of requests in the queue."""
        return len(self._waiting)

    def _compute_waiting(self) -> None:
        by_layer: dict[tuple[int, torch.dtype, int], list[_QueuedRequest]] = {}
        while self._waiting:
            work = self._waiting.popleft()
            if self._clock() > work.expires:
                work.error = DispatchTimeout("the caller's deadline passed before the experts were free")
                work.done = True
            else:
                key = (work.request.layer, work.request.hidden_TH.dtype, work.request.expert_ids_TK.shape[1])
                by_layer.setdefault(key, []).append(work)
        for (layer, _, _), group in by_layer.items():
            error = self._compute(layer, group)
            for work in group:
                # One bad request must not fail those that shared its batch.
                work.error = self._compute(layer, [work]) if error and len(group) > 1 else error
                work.done = True

    def _compute(self, layer: int, group: list[_QueuedRequest]) -> DeepsplitError | None:
        started = self._clock()
        requests = [work.request for work in group]
        try:
            output_TH = self._experts(
                layer,
                _concatenate([r.hidden_TH for r in requests]),
                _concatenate([r.expert_ids_TK for r in requests]).to(torch.int32),
                _concatenate([r.weights_TK for r in requests]),
            )
        except DeepsplitError as error:
            return error
        except Exception as error:  # the worker lives on, whatever a kernel raises
            failed = WorkerLost(f"expert computation failed: {error!r}")
            failed.__cause__ = error
            return failed
        took_s = self._clock() - started
        self.busy_s += took_s
        compute_us = int(took_s * 1e6)
        for work, piece in zip(group, output_TH.split([len(r.hidden_TH) for r in requests]), strict=True):
            work.output_TH, work.compute_us = piece, compute_us
            work.queue_us = int((started - work.arrived) * 1e6)
        if self._meter is not None:
            queued = tuple(started - work.arrived for work in group)
            self._meter.batch(BatchSample(len(output_TH), compute_us / 1e6, queued))
        if logger.isEnabledFor(logging.DEBUG):
            _log_batch(layer, group, compute_us)
        return None


def _log_batch(layer: int, group: list[_QueuedRequest], compute_us: int) -> None:
    fields = {
        "request_id": join_request_ids(dict.fromkeys(work.request.request_ids for work in group)),
        "layer": layer,
        "rows": sum(len(work.request.hidden_TH) for work in group),
        "requests": len(group),
        "queue_us": max(work.queue_us for work in group),
        "compute_us": compute_us,
    }
    logger.debug("batch computed", extra={"fields": fields})


def _concatenate(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


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
    ) -> None:
        self._batcher = LayerBatcher(experts, meter)
        self._meter = meter
        self._hidden_size = hidden_size
        self._model_id = model_id
        self._tls = tls
        self._server = grpc.server(
            # One thread per stream; a stream beyond the bound is refused, not queued.
            ThreadPoolExecutor(_MAX_STREAMS, thread_name_prefix="experts"),
            options=channel_options(settings),
            maximum_concurrent_rpcs=_MAX_STREAMS,
        )
        handler = grpc.stream_stream_rpc_method_handler(self._dispatch)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))

    def start(self, host: str, port: int = 0) -> str:
        """Listen; returns host:port. Port 0 takes a free one. Raises StartupError."""
        target = bracketed(host)
        try:
            if self._tls is None:
                bound = self._server.add_insecure_port(f"{target}:{port}")
            else:
                bound = self._server.add_secure_port(f"{target}:{port}", expert_server_credentials(self._tls))
        except RuntimeError as error:
            raise StartupError(f"expert worker cannot listen on {target}:{port}: {error}; see experts.host") from None
        self._server.start()
        return f"{target}:{bound}"

    def stop(self, grace_s: float) -> None:
        """Take no new stream, let running ones end for `grace_s`, then break them."""
        self._server.stop(grace_s).wait()

    def _dispatch(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        if self._tls is not None and not peer_is(self._tls.server_name, context.auth_context()):
            context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"the caller's certificate is not for {self._tls.server_name} (internal_tls.server_name)",
            )
        theirs = dict(context.invocation_metadata()).get(MODEL_KEY)
        if theirs != self._model_id:
            context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this worker serves model {self._model_id}, the caller {theirs}: one cluster, one checkpoint",
            )
        with self._counted():
            for frame in frames:
                yield self._answer(frame)

    def waiting(self) -> int:
        """Return the number of requests in the queue."""
        return self._batcher.waiting()

    def busy_s(self) -> float:
        """Return the seconds in which experts were computed, so far."""
        return self._batcher.busy_s

    @contextmanager
    def _counted(self) -> Iterator[None]:
        if self._meter is None:
            yield
            return
        with self._meter.metrics.streams.track_inprogress():
            yield

    def _answer(self, frame: bytes) -> bytes:
        frame_id = peek_frame_id(frame)
        try:
            return self._reply(decode_request(frame, self._hidden_size))
        except DeepsplitError as error:
            bug = error.__cause__
            fields = {"request_id": peek_request_ids(frame)}
            level = logging.ERROR if bug else logging.WARNING
            logger.log(level, "request not computed: %s", error, exc_info=bug, extra={"fields": fields})
            if self._meter is not None:
                self._meter.failed(error.outcome)
            return encode_error(frame_id, error)

    def _reply(self, request: DispatchRequest) -> bytes:
        work = self._batcher.submit(request)
        if work.error is not None:
            raise work.error
        assert work.output_TH is not None
        output_TH = work.output_TH.to(request.reply_dtype)
        return encode_reply(
            DispatchReply(request.frame_id, request.epoch, request.layer, work.queue_us, work.compute_us, output_TH)
        )
