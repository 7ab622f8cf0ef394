"""An HTTP/2 client that sends and withholds what no gRPC client would."""

from __future__ import annotations

import asyncio
import struct
from collections import defaultdict
from types import TracebackType
from typing import Self

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
ACK, END_STREAM, END_HEADERS = 0x1, 0x1, 0x4
_INITIAL_WINDOW_SIZE = 4
FIRST_WINDOW = 65_535


class RawClient:
    """One connection. It notes the windows that the server opens for what it sends, and opens none of its own."""

    def __init__(self, port: int, own_window: int = FIRST_WINDOW) -> None:
        """`own_window`: bytes of an answer that the server may send on a stream."""
        self._port = port
        self._own_window = own_window
        self._last = -1
        self.first_window = FIRST_WINDOW
        self.opened: defaultdict[int, int] = defaultdict(int)  # bytes beyond the first window, by stream
        self.ended: set[int] = set()
        self.goaway = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, self._own_window)
        self._writer.write(PREFACE + _frame(SETTINGS, 0, 0, settings))
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reading.cancel()
        self._writer.close()

    async def call(self, method: str, data: bytes = b"", *fields: tuple[str, str], end: bool = False) -> int:
        """Open a call and send these bytes of its messages; returns its stream."""
        self._last += 2
        lines = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "x"),
                 ("content-type", "application/grpc"), ("te", "trailers"), *fields]  # fmt: skip
        block = b"".join(_field(name.encode(), value.encode()) for name, value in lines)
        self._writer.write(_frame(HEADERS, END_HEADERS, self._last, block))
        await self.send(self._last, data, end)
        return self._last

    async def send(self, stream: int, data: bytes, end: bool = False) -> None:
        """Send within the first window, or what the server has opened."""
        if data or end:
            self._writer.write(_frame(DATA, END_STREAM if end else 0, stream, data))
        await self._writer.drain()

    async def _read(self) -> None:
        while True:
            header = await self._reader.readexactly(9)
            kind, flags, stream = header[3], header[4], int.from_bytes(header[5:])
            payload = await self._reader.readexactly(int.from_bytes(header[:3]))
            if kind == SETTINGS and not flags & ACK:
                for at in range(0, len(payload), 6):
                    name, value = struct.unpack_from(">HI", payload, at)
                    if name == _INITIAL_WINDOW_SIZE:
                        self.first_window = value
                self._writer.write(_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                self._writer.write(_frame(PING, ACK, 0, payload))
            elif kind == WINDOW_UPDATE:
                self.opened[stream] += int.from_bytes(payload)
            elif kind == GOAWAY:
                self.goaway.set()
            elif kind in (HEADERS, DATA) and flags & END_STREAM:
                self.ended.add(stream)


def message(data: bytes, size: int | None = None) -> bytes:
    """As gRPC frames it; `size`: as announced, if it is to be another than it has."""
    return b"\0" + struct.pack(">I", len(data) if size is None else size) + data


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def _field(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value
