"""What broken and hostile clients do to a gRPC port: frames by hand, and wrong bytes through a right channel."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import Sequence

import grpc

from tests.integration.http_attacks import Attack, Peer, Target
from tests.integration.reflection_client import ReflectionClient

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 0x1, 0x4
PROBE, SESSION = "/grpc.health.v1.Health/Check", "/inference.GRPCInferenceService/ModelStreamInfer"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """One HPACK literal without indexing, up to 126 bytes each."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


def headers(method: str) -> bytes:
    """The header block of a call."""
    fields = ((b":method", b"POST"), (b":scheme", b"http"), (b":path", method.encode()), (b":authority", b"x"),
              (b"content-type", b"application/grpc"), (b"te", b"trailers"))  # fmt: skip
    return b"".join(field(name, value) for name, value in fields)


def opening(method: str, stream: int = 1) -> bytes:
    """Preface, empty settings, and the headers of one call."""
    return PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, END_HEADERS, stream, headers(method))


def attacks(method: str) -> Sequence[Attack]:
    """`method`: full name of a method that exists, such as /package.Service/Method."""

    async def random_bytes(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(rng.randbytes(rng.randint(1, 4096)))
        await peer.answer(0.2)

    async def http1(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await peer.answer(0.2)

    async def random_frames(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(PREFACE + frame(SETTINGS, 0, 0, b""))
        for _ in range(50):
            payload = rng.randbytes(rng.randint(0, 64))
            await peer.send(frame(rng.randrange(256), rng.randrange(256), rng.choice([0, 1, 2, 3, 2**31 - 1]), payload))
        await peer.answer(0.2)

    async def garbage_after_preface(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(PREFACE + rng.randbytes(2000))
        await peer.answer(0.2)

    async def huge_header_list(target: Target, peer: Peer, rng: random.Random) -> None:
        block = headers(method)
        await peer.send(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(HEADERS, 0, 1, block))
        more = b"".join(field(b"x-%d" % i, b"a" * 100) for i in range(140))
        for _ in range(100):
            await peer.send(frame(CONTINUATION, 0, 1, more))
        await peer.answer(0.2)

    async def pings(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(PREFACE + frame(SETTINGS, 0, 0, b"") + frame(PING, 0, 0, bytes(8)) * 2000)
        await peer.answer(0.2)

    async def settings_flood(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * 1000)
        await peer.answer(0.2)

    async def rapid_reset(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(PREFACE + frame(SETTINGS, 0, 0, b""))
        for stream in range(1, 401, 2):
            reset = frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
            await peer.send(frame(HEADERS, END_HEADERS, stream, headers(method)) + reset)
        await peer.answer(0.2)

    async def truncated_message(target: Target, peer: Peer, rng: random.Random) -> None:
        data = b"\x00" + struct.pack(">I", 1000) + b"abc"
        await peer.send(opening(method) + frame(DATA, END_STREAM, 1, data))
        await peer.answer(0.2)

    async def message_too_large(target: Target, peer: Peer, rng: random.Random) -> None:
        data = b"\x00" + struct.pack(">I", 2**31) + b"a" * 10_000
        await peer.send(opening(method) + frame(DATA, 0, 1, data))
        await peer.answer(0.2)

    async def never_ended(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(opening(method) + frame(DATA, 0, 1, b"\x00\x00"))
        await asyncio.sleep(rng.random() * 0.2)
        if rng.random() < 0.5:
            peer.reset()

    async def half_closed(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(opening(method))
        with contextlib.suppress(OSError):
            peer.writer.write_eof()
        await peer.answer(0.2)

    async def slow_preface(target: Target, peer: Peer, rng: random.Random) -> None:
        for byte in PREFACE[:20]:
            await peer.send(bytes([byte]))
            await asyncio.sleep(0.02)

    async def silent_calls(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(opening(method))
        for stream in range(3, 201, 2):
            await peer.send(frame(HEADERS, END_HEADERS, stream, headers(rng.choice([method, PROBE]))))
        await peer.answer(0.5)

    async def declared_and_not_sent(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(PREFACE + frame(SETTINGS, 0, 0, b""))
        data = b"\x00" + struct.pack(">I", 2**22) + b"\x12" * 600
        for stream in range(1, 201, 2):
            call = frame(HEADERS, END_HEADERS, stream, headers(rng.choice([method, SESSION])))
            await peer.send(call + frame(DATA, 0, stream, data))
        await peer.answer(0.5)

    async def no_window_for_answers(target: Target, peer: Peer, rng: random.Random) -> None:
        await peer.send(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 0)))
        for stream in range(1, 201, 2):
            call = frame(HEADERS, END_HEADERS, stream, headers(PROBE))
            await peer.send(call + frame(DATA, END_STREAM, stream, bytes(5)))
        await peer.answer(0.5)

    return (random_bytes, http1, random_frames, garbage_after_preface, huge_header_list, pings, settings_flood,
            rapid_reset, truncated_message, message_too_large, never_ended, half_closed, slow_preface,
            silent_calls, declared_and_not_sent, no_window_for_answers)  # fmt: skip


ALLOWED = {
    grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN,
}  # fmt: skip


def methods(target: Target) -> list[str]:
    """Full names of all methods, by reflection; without Watch, whose streams never end."""
    with grpc.insecure_channel(f"{target.host}:{target.port}") as channel:
        reflected = ReflectionClient(channel)
        names = [f"/{service}/{method}" for service in reflected.services() for method in reflected.methods(service)]
    return [name for name in names if not name.endswith("/Watch")]


async def is_serving(target: Target) -> bool:
    """What the health service says to a client with a new connection."""
    async with grpc.aio.insecure_channel(f"{target.host}:{target.port}") as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        return await check(b"", timeout=5) == b"\x08\x01"  # status: SERVING


async def wrong_messages(target: Target, methods: Sequence[str], rng: random.Random, count: int) -> None:
    """Random bytes as messages of right calls: an answer or an error, never silence."""
    async with grpc.aio.insecure_channel(f"{target.host}:{target.port}") as channel:
        for _ in range(count):
            call = channel.unary_stream(rng.choice(methods), None, None)(rng.randbytes(rng.randint(0, 200)), timeout=10)
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for _message in call:
                    pass
            assert await call.code() in ALLOWED, await call.code()
