"""How a worker shared its time before it had turns, for comparison: a thread per stream, and whichever thread gets the
lock computes all that wait, of all layers, before anybody is answered.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import torch

from cluster.config import DispatchConfig
from routing.tokens.channel import METHOD, SERVICE, channel_options
from routing.tokens.turn_runner import ComputeExperts
from routing.tokens.wire import DispatchReply, DispatchRequest, decode_request, encode_reply


class _Work:
    def __init__(self, request: DispatchRequest) -> None:
        self.request = request
        self.output_TH: torch.Tensor | None = None


class FlatCombiningServer:
    """Neither deadlines nor errors: a reference for answer times only."""

    def __init__(self, experts: ComputeExperts, hidden_size: int, settings: DispatchConfig) -> None:
        self._experts = experts
        self._hidden_size = hidden_size
        self._waiting: deque[_Work] = deque()
        self._computing = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(16), options=channel_options(settings))
        handler = grpc.stream_stream_rpc_method_handler(self._dispatch)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))

    def start(self, host: str) -> str:
        """Listen on a free port; returns host:port."""
        port = self._server.add_insecure_port(f"{host}:0")
        self._server.start()
        return f"{host}:{port}"

    def stop(self, grace_s: float) -> None:
        """Break all streams."""
        self._server.stop(grace_s).wait()

    def _dispatch(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for frame in frames:
            work = _Work(decode_request(frame, self._hidden_size))
            self._waiting.append(work)
            with self._computing:
                if work.output_TH is None:
                    self._compute_waiting()
            assert work.output_TH is not None
            request = work.request
            output_TH = work.output_TH.to(request.reply_dtype)
            yield encode_reply(DispatchReply(request.frame_id, request.epoch, request.layer, 0, 0, output_TH))

    def _compute_waiting(self) -> None:
        by_layer: dict[int, list[_Work]] = {}
        while self._waiting:
            work = self._waiting.popleft()
            by_layer.setdefault(work.request.layer, []).append(work)
        for layer, group in by_layer.items():
            requests = [work.request for work in group]
            output_TH = self._experts(
                layer,
                torch.cat([request.hidden_TH for request in requests]),
                torch.cat([request.expert_ids_TK for request in requests]),
                torch.cat([request.weights_TK for request in requests]),
            )
            pieces = output_TH.split([len(request.hidden_TH) for request in requests])
            for work, piece in zip(group, pieces, strict=True):
                work.output_TH = piece
