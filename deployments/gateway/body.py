"""Reads a request's body: bounded in size, in time and, over all requests, in memory; unpacked if it came packed."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable

from cluster.errors import RequestTimeout, RequestTooLarge, UnsupportedEncoding
from deployments.gateway.lease import Lease

READ_TIMEOUT_S = 60.0  # a body that takes longer to arrive is a slow attack or a dead client


async def read_body(lease: Lease, chunks: AsyncIterator[bytes], encoding: str, limit_bytes: int) -> bytes:
    """The body without its byte order mark. `encoding` is its Content-Encoding; empty for none.

    Raises RequestTooLarge, RequestTimeout, UnsupportedEncoding, RequestError (broken packing), Overloaded (memory).
    """
    unpack = _unpacker(encoding.strip().lower())
    parts: list[bytes] = []
    size = 0

    def take(part: bytes) -> None:
        nonlocal size
        size += len(part)
        if size > limit_bytes:
            raise RequestTooLarge(
                f"the request body is larger than {limit_bytes // 2**20} MiB, this server's limit "
                "(gateway.max_body_mib)"
            )
        lease.hold(len(part))
        parts.append(part)

    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for chunk in chunks:
                unpack(chunk, take, limit_bytes - size + 1)
    except TimeoutError as error:
        raise RequestTimeout(f"the request body did not arrive within {READ_TIMEOUT_S:g} s") from error
    unpack(b"", take, limit_bytes - size + 1)
    return b"".join(parts).removeprefix(codecs.BOM_UTF8)


Take = Callable[[bytes], None]


def _unpacker(encoding: str) -> Callable[[bytes, Take, int], None]:
    """Hands on what a piece unpacks to, never more than one piece of the given size beyond the limit."""
    if encoding in ("", "identity"):
        return lambda piece, take, _: take(piece) if piece else None
    raise UnsupportedEncoding(f"Content-Encoding {encoding!r} is not read here: send gzip, deflate or zstd, or none")


