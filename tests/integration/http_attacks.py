"""What broken and hostile clients do to an HTTP/1.1 port. Each attack is one connection; none expects an answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

ANSWER_S = 5.0  # how long an attacker waits for an answer before it goes


@dataclass(frozen=True)
class Target:
    """Where to, and a body that streams for longer than any attack takes."""

    host: str
    port: int
    model: str

    def body(self, max_tokens: int = 4) -> bytes:
        """A streaming completion request."""
        return json.dumps({"model": self.model, "prompt": "def f(", "max_tokens": max_tokens, "stream": True}).encode()


def head(target: Target, *lines: str, path: str = "/v1/completions", method: str = "POST") -> bytes:
    """Request line and header lines."""
    fixed = (f"{method} {path} HTTP/1.1", f"host: {target.host}", "content-type: application/json")
    return "\r\n".join((*fixed, *lines)).encode() + b"\r\n\r\n"


def request(target: Target, max_tokens: int = 4) -> bytes:
    """A whole valid request."""
    body = target.body(max_tokens)
    return head(target, f"content-length: {len(body)}") + body


class Peer:
    """One connection of an attacker; a server that closes it or resets it is right."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> None:
        """Write what the server still takes."""
        if self.writer.is_closing():
            return
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def answer(self, wait_s: float = ANSWER_S) -> bytes:
        """All that comes until the server closes or time is up."""
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(wait_s):
                while data := await self.reader.read(65536):
                    got += data
        return got

    def reset(self) -> None:
        """Go away with a RST instead of a FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def connect(target: Target, receive_buffer: int | None = None) -> Peer:
    """A connection; `receive_buffer` in bytes: a reader that is soon full."""
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(sock, (target.host, target.port))
    return Peer(*await asyncio.open_connection(sock=sock, limit=4096 if receive_buffer else 2**16))


async def random_bytes(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(rng.randbytes(rng.randint(1, 4096)))
    await peer.answer(0.2)


async def mutated_request(target: Target, peer: Peer, rng: random.Random) -> None:
    data = bytearray(request(target))
    for _ in range(rng.randint(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    await peer.send(bytes(data))
    await peer.answer(0.5)


async def huge_headers(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(head(target).removesuffix(b"\r\n"))
    for _ in range(64):
        await peer.send(b"x-%d: " % rng.randrange(10**6) + b"a" * 16384 + b"\r\n")
    answer = await peer.answer()
    assert not answer.startswith(b"HTTP/1.1 2"), "a megabyte of headers was taken"


async def endless_header_line(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(b"GET /health HTTP/1.1\r\nx: ")
    for _ in range(64):
        await peer.send(b"a" * 16384)
    await peer.answer()


async def endless_request_line(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(b"GET /")
    for _ in range(64):
        await peer.send(b"a" * 16384)
    await peer.answer()


async def slow_sender(target: Target, peer: Peer, rng: random.Random) -> None:
    for byte in request(target)[:25]:
        await peer.send(bytes([byte]))
        await asyncio.sleep(0.02)


async def slow_body(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(head(target, "content-length: 1000"))
    for _ in range(25):
        await peer.send(b" ")
        await asyncio.sleep(0.02)


async def slow_reader(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(request(target, max_tokens=2000))
    await asyncio.sleep(0.5)  # asyncio reads up to its limit, the kernel up to the small buffer, then nobody


async def half_closed(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(request(target, max_tokens=50))
    with contextlib.suppress(OSError):
        peer.writer.write_eof()
    await peer.answer(0.5)


async def half_closed_early(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(request(target)[: rng.randrange(1, 150)])
    with contextlib.suppress(OSError):
        peer.writer.write_eof()
    await peer.answer(0.5)


async def reset_in_stream(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(request(target, max_tokens=2000))
    await peer.reader.read(100)
    await asyncio.sleep(rng.random() * 0.05)
    peer.reset()


async def reset_at_once(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(request(target, max_tokens=2000))
    await asyncio.sleep(rng.random() * 0.02)
    peer.reset()


async def short_body(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(head(target, "content-length: 1000") + target.body())


async def truncated_chunks(target: Target, peer: Peer, rng: random.Random) -> None:
    chunk = rng.choice([b'40\r\n{"model"', b"5\r\nabcde", b"f" * 16 + b"\r\nabc", b"zz\r\nabc\r\n", b"-5\r\nabc\r\n"])
    await peer.send(head(target, "transfer-encoding: chunked") + chunk)
    await asyncio.sleep(rng.random() * 0.1)


async def endless_trailers(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(head(target, "transfer-encoding: chunked") + b"2\r\n{}\r\n0\r\n")
    for _ in range(64):
        await peer.send(b"x-%d: " % rng.randrange(10**6) + b"a" * 16384 + b"\r\n")
    await peer.answer()


async def endless_chunk_extension(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(head(target, "transfer-encoding: chunked") + b"2;")
    for _ in range(64):
        await peer.send(b"e" * 16384)
    await peer.answer()


async def body_without_end(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(head(target, "transfer-encoding: chunked", path="/nowhere"))
    for _ in range(100):
        await peer.send(b"4000\r\n" + b"a" * 16384 + b"\r\n")
    answer = await peer.answer(2)
    assert answer.startswith(b"HTTP/1.1 404"), f"answered {answer[:60]!r}"


async def bomb(target: Target, peer: Peer, rng: random.Random) -> None:
    body = BOMBS[rng.randrange(len(BOMBS))]
    lines = ("content-encoding: gzip", f"content-length: {len(body)}", "connection: close")
    await peer.send(head(target, *lines) + body)
    answer = await peer.answer()
    assert answer.startswith(b"HTTP/1.1 4"), f"a bomb was answered {answer[:60]!r}"


async def way_round(target: Target, peer: Peer, rng: random.Random) -> None:
    up, between = rng.choice(("..", "%2e%2e", "..;", "..%00")), rng.choice(("/", "%2F", "//", "\\"))
    path = f"/v1/models/{up}{between}{up}{between}" + rng.choice(("metrics", "deepsplit/load", "v1/completions"))
    await peer.send(head(target, "connection: close", path=path, method="GET"))
    answer = await peer.answer()
    assert answer.startswith(b"HTTP/1.1 4"), f"{path} was answered {answer[:60]!r}"


async def offered_upgrade(target: Target, peer: Peer, rng: random.Random) -> None:
    body = target.body()
    lines = ("connection: Upgrade, HTTP2-Settings, close", "upgrade: h2c", "http2-settings: AAEAAEAAAAIAAAAB")
    data = head(target, *lines, f"content-length: {len(body)}") + body
    cut = rng.randrange(1, len(data))
    await peer.send(data[:cut])
    await asyncio.sleep(0.01)
    await peer.send(data[cut:])
    answer = await peer.answer()
    assert answer.startswith(b"HTTP/1.1 200"), f"an offer of HTTP/2 was answered {answer[:60]!r}"


async def old_client(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(request(target).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    answer = await peer.answer()
    assert b"transfer-encoding" not in answer.partition(b"\r\n\r\n")[0].lower(), "an HTTP/1.0 client got chunks"


async def two_lengths(target: Target, peer: Peer, rng: random.Random) -> None:
    body = target.body()
    lines = rng.choice([
        (f"content-length: {len(body)}", "transfer-encoding: chunked"),
        (f"content-length: {len(body)}", f"content-length: {len(body) + 1}"),
        ("content-length: -1",), (f"content-length: {10**30}",), ("content-length: 0x10",),
    ])  # fmt: skip
    await peer.send(head(target, *lines) + body)
    answer = await peer.answer(0.5)
    assert not answer.startswith(b"HTTP/1.1 2"), f"{lines} was taken"


async def pipelined(target: Target, peer: Peer, rng: random.Random) -> None:
    await peer.send(head(target, path="/health", method="GET") * 50 + request(target) * 3)
    await peer.answer(0.5)


async def odd_json(target: Target, peer: Peer, rng: random.Random) -> None:
    body = rng.choice(ODD_BODIES)
    await peer.send(head(target, f"content-length: {len(body)}", "connection: close") + body)
    answer = await peer.answer()
    assert b"HTTP/1.1 4" in answer[:12], f"{body[:60]!r} was answered {answer[:60]!r}"


ODD_BODIES = (
    b"[" * 100_000, b'{"a":' * 100_000, b"[" + b"[]," * 200_000 + b"[]]", b"\xff\xfe", b"null", b"[]",
    b'"x"', b'{"model": 5}', b"{}}", b"\x00",
    b'{"model": "\\ud800"}', b'{"model": "other"}', b"",
)  # fmt: skip

BOMBS = (
    gzip.compress(bytes(2**25)),
    gzip.compress(gzip.compress(bytes(2**25))),
    gzip.compress(b"") * 20_000,
    gzip.compress(b"[" * 2**23),
)

Attack = Callable[[Target, Peer, random.Random], Awaitable[None]]
ATTACKS: tuple[Attack, ...] = (
    random_bytes, mutated_request, huge_headers, endless_header_line, endless_request_line, slow_sender, slow_body,
    slow_reader, half_closed, half_closed_early, reset_in_stream, reset_at_once, short_body, truncated_chunks,
    endless_trailers, endless_chunk_extension, body_without_end, bomb, way_round, offered_upgrade, old_client,
    two_lengths, pipelined, odd_json,
)  # fmt: skip


async def run(attack: Attack, target: Target, rng: random.Random) -> None:
    """One attack on a connection of its own."""
    peer = await connect(target, 4096 if attack is slow_reader else None)
    try:
        await attack(target, peer, rng)
    except ConnectionError:
        pass  # the server closed it
    finally:
        peer.writer.close()
        with contextlib.suppress(OSError):
            await peer.writer.wait_closed()
