"""An expert server in this process, and raw streams to it that do what our own client never would."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import grpc
import torch

from cluster.config import DispatchConfig
from monitoring.expert_meter import ExpertMeter
from routing.tokens.channel import METHOD_PATH, MODEL_KEY, channel_options
from routing.tokens.server import ExpertServer
from routing.tokens.turn_runner import ComputeExperts
from routing.tokens.wire import DispatchReply, DispatchRequest, ErrorReply, decode_reply, encode_request

HIDDEN, MODEL = 4, "model"
WAIT_S = 30.0
SETTINGS = DispatchConfig()


def twice(layer: int, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
    """Experts that double a row."""
    return hidden_TH * 2


def frame(frame_id: int = 1, layer: int = 1, rows: int = 2, request_ids: str = "", deadline_ms: int = 60_000) -> bytes:
    """A request whose rows are all `frame_id`."""
    hidden_TH, ids_TK = torch.full((rows, HIDDEN), float(frame_id)), torch.zeros(rows, 1, dtype=torch.int16)
    return encode_request(
        DispatchRequest(
            frame_id, 1, layer, deadline_ms, hidden_TH, ids_TK, torch.ones(rows, 1), torch.float32, request_ids
        )
    )


class Gate:
    """Experts that wait until the test opens them."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.layers: list[int] = []

    def __call__(self, layer: int, hidden_TH: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        self.layers.append(layer)
        self.entered.set()
        assert self.open.wait(WAIT_S)
        return hidden_TH * 2


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    until = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


class RawStream:
    """One stream of a connection of its own."""

    def __init__(self, address: str, model: str | None = MODEL, path: str = METHOD_PATH, **settings: float) -> None:
        self.channel = grpc.insecure_channel(
            address, options=channel_options(DispatchConfig.model_validate(SETTINGS.model_dump() | settings))
        )
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        metadata = () if model is None else ((MODEL_KEY, model),)
        self.call = self.channel.stream_stream(path)(iter(self._outbox.get, None), metadata=metadata)

    def send(self, *frames: bytes) -> None:
        for one in frames:
            self._outbox.put(one)

    def half_close(self) -> None:
        self._outbox.put(None)

    def reply(self) -> DispatchReply | ErrorReply:
        return decode_reply(next(self.call))

    def ask(self, one: bytes) -> DispatchReply | ErrorReply:
        self.send(one)
        return self.reply()

    def close(self) -> None:
        self.half_close()
        self.call.cancel()
        self.channel.close()


@contextmanager
def serving(
    experts: ComputeExperts = twice, meter: ExpertMeter | None = None, **settings: float
) -> Iterator[tuple[ExpertServer, Callable[..., RawStream]]]:
    """A server, and how to open streams to it; all are gone afterwards."""
    config = DispatchConfig.model_validate(SETTINGS.model_dump() | settings)
    server = ExpertServer(experts, HIDDEN, MODEL, config, meter=meter)
    address = server.start("127.0.0.1")
    streams: list[RawStream] = []

    def connect(**options: object) -> RawStream:
        streams.append(RawStream(address, **options))  # type: ignore[arg-type]
        return streams[-1]

    try:
        yield server, connect
    finally:
        for stream in streams:
            stream.close()
        server.stop(0)
