"""Reads a request's body: bounded in size, in time and, over all requests, in memory; unpacked if it came packed."""

from __future__ import annotations

import asyncio
import codecs
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial

import zstandard

from cluster.errors import RequestError, RequestTimeout, RequestTooLarge, UnsupportedEncoding
from deployments.gateway.lease import Lease

READ_TIMEOUT_S = 60.0  # a body that takes longer to arrive is a slow attack or a dead client
_MOST_ENCODINGS = 3  # one over another; each may cost as much as the largest body
_SLICE_BYTES = 16 * 1024  # packed bytes that are looked at at once
_PIECE_BYTES = 256 * 1024  # unpacked bytes after which other requests have their turn: about 1 ms
_ZSTD_WINDOW_BYTES = 8 * 2**20  # RFC 9659
_ZLIB, _DEFLATE, _GZIP = 15, -15, 31  # what zlib calls them


async def read_body(
    lease: Lease, chunks: AsyncIterator[bytes], encodings: str, limit_bytes: int, declared: str = ""
) -> bytes:
    """The body without its byte order mark. `encodings` is its Content-Encoding, `declared` its Content-Length; empty
    for none. A body that says itself that it is too large is not read: its client may not have sent it yet.

    Raises RequestTooLarge, RequestTimeout, UnsupportedEncoding, RequestError (broken packing), Overloaded (memory).
    """
    unpackers = _unpackers(encodings)
    if declared.isdecimal() and int(declared) > limit_bytes:
        raise _too_large(limit_bytes)
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            body = await _joined(lease, chunks, limit_bytes)
    except TimeoutError as error:
        raise RequestTimeout(f"the request body did not arrive within {READ_TIMEOUT_S:g} s") from error
    for unpack in reversed(unpackers):
        try:
            body = await _joined(lease, _in_turns(unpack(body)), limit_bytes)
        except (zlib.error, zstandard.ZstdError) as error:
            raise RequestError(f"the request body is not valid {encodings}, its Content-Encoding: {error}") from error
    return body.removeprefix(codecs.BOM_UTF8)


async def _joined(lease: Lease, pieces: AsyncIterator[bytes], limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for piece in pieces:
        size += len(piece)
        if size > limit_bytes:
            raise _too_large(limit_bytes)
        lease.hold(len(piece))
        parts.append(piece)
    return b"".join(parts)


def _too_large(limit_bytes: int) -> RequestTooLarge:
    limit = f"{limit_bytes // 2**20} MiB, this server's limit (gateway.max_body_mib)"
    return RequestTooLarge(f"the request body is larger than {limit}")


async def _in_turns(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


def _unpackers(encodings: str) -> list[Callable[[bytes], Iterator[bytes]]]:
    """In the order in which they were applied. Raises UnsupportedEncoding."""
    named = [name for part in encodings.lower().split(",") if (name := part.strip()) not in ("", "identity")]
    if len(named) > _MOST_ENCODINGS or not all(name in _UNPACKERS for name in named):
        raise UnsupportedEncoding(
            f"Content-Encoding {encodings[:64]!r} is not read here: send gzip, deflate or zstd (at most "
            f"{_MOST_ENCODINGS} over one another), or none"
        )
    return [_UNPACKERS[name] for name in named]


def _undeflate(packed: bytes) -> Iterator[bytes]:
    """Some clients leave out the wrapping that RFC 9110 asks for."""
    wrapped = len(packed) > 1 and packed[0] & 0xF == 8 and int.from_bytes(packed[:2], "big") % 31 == 0
    return _inflate(packed, _ZLIB if wrapped else _DEFLATE)


def _inflate(packed: bytes, kind: int) -> Iterator[bytes]:
    member = zlib.decompressobj(kind)
    for at in range(0, len(packed), _SLICE_BYTES):
        rest = packed[at : at + _SLICE_BYTES]
        while rest:
            if member.eof:
                member = zlib.decompressobj(kind)  # another one follows
            yield member.decompress(rest, _PIECE_BYTES)
            rest = member.unconsumed_tail or member.unused_data
    while piece := member.decompress(b"", _PIECE_BYTES):
        yield piece
    if not member.eof:
        raise zlib.error("it ends early")


def _unzstd(packed: bytes) -> Iterator[bytes]:
    unpacker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    with unpacker.stream_reader(packed, read_across_frames=True) as reader:
        while piece := reader.read(_PIECE_BYTES):
            yield piece


_UNPACKERS: dict[str, Callable[[bytes], Iterator[bytes]]] = {
    "gzip": partial(_inflate, kind=_GZIP),
    "x-gzip": partial(_inflate, kind=_GZIP),
    "deflate": _undeflate,
    "zstd": _unzstd,
}
