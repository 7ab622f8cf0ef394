"""Request bodies: packed, marked, huge, slow, broken."""

from __future__ import annotations

import asyncio
import gzip
import random
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import (
    DeepsplitError,
    Overloaded,
    RequestError,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedEncoding,
)
from deployments.gateway import body as body_module
from deployments.gateway.body import read_body
from deployments.gateway.head import Head
from tests.unit.deployments.gateway.gateway_world import FakePool, World
from tests.unit.deployments.gateway.rest.rest_world import ANSWER, RestWorld, post

LIMIT = 2**20
TEXT = b'{"prompt": "hello hello hello"}'


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


Pack = Callable[[bytes], bytes]
PACKERS: dict[str, Pack] = {"gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress, "zstd": zstd}


async def pieces(data: bytes, cuts: Sequence[int] = ()) -> AsyncIterator[bytes]:
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in pairwise(bounds):
        yield data[begin:end]
        await asyncio.sleep(0)


def read(data: bytes, encodings: str = "", limit: int = LIMIT, cuts: Sequence[int] = (), **limits: object) -> bytes:
    """What becomes of a body; nothing of it is held afterwards."""
    world = World(FakePool(), **limits)  # type: ignore[arg-type]

    async def run() -> bytes:
        async with world.pipeline.open(Head("POST", "/v1/completions", "r1")) as lease:
            got = await read_body(lease, pieces(data, cuts), encodings, limit)
            assert world.pipeline._memory.held_bytes >= len(got)
            return got

    try:
        return asyncio.run(run())
    finally:
        assert world.nothing_left()


def refused(error: type[DeepsplitError], message: str, data: bytes, encodings: str = "", **more: object) -> None:
    with pytest.raises(error, match=message):
        read(data, encodings, **more)  # type: ignore[arg-type]


@given(
    body=st.binary(max_size=2000)
    | st.builds(lambda part, times: part * times, st.binary(max_size=40), st.integers(0, 20000)),
    names=st.lists(st.sampled_from([*PACKERS, "identity", "GZIP", ""]), max_size=3),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_what_was_packed_is_what_is_read(body: bytes, names: list[str], cuts: list[int]) -> None:
    packed = body
    for name in names:
        packed = PACKERS.get(name.lower(), bytes)(packed)
    assert read(packed, " , ".join(names), cuts=cuts) == body.removeprefix(b"\xef\xbb\xbf")


@pytest.mark.parametrize("packed", [raw_deflate(TEXT), zlib.compress(TEXT, 1), zlib.compress(TEXT, 9)])
def test_deflate_with_and_without_its_wrapping(packed: bytes) -> None:
    assert read(packed, "deflate") == TEXT


def test_several_members_or_frames_are_one_body() -> None:
    for name in ("gzip", "deflate", "zstd"):
        assert read(PACKERS[name](TEXT) + PACKERS[name](b"") + PACKERS[name](TEXT), name) == TEXT + TEXT


@pytest.mark.parametrize("name", PACKERS)
def test_a_byte_order_mark_is_taken_off(name: str) -> None:
    assert read(b"\xef\xbb\xbf" + TEXT) == TEXT
    assert read(PACKERS[name](b"\xef\xbb\xbf" + TEXT), name) == TEXT
    assert read(b"\xef\xbb\xbf\xef\xbb\xbf{}") == b"\xef\xbb\xbf{}"  # one, and only in front


@pytest.mark.parametrize(
    "encodings", ["br", "compress", "gzip;q=1", "aws-chunked", "gzip, br", "*", "x" * 9000, ",".join(["gzip"] * 4)]
)
def test_other_encodings_are_refused_before_a_byte_is_read(encodings: str) -> None:
    refused(UnsupportedEncoding, "send gzip, deflate or zstd", b"", encodings)

    async def never() -> AsyncIterator[bytes]:
        pytest.fail("it was read")
        yield b""

    async def run() -> None:
        async with World(FakePool()).pipeline.open(Head("POST", "/v1/completions", "r1")) as lease:
            await read_body(lease, never(), encodings, LIMIT)

    with pytest.raises(UnsupportedEncoding):
        asyncio.run(run())


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
def test_broken_packing(name: str) -> None:
    packed = PACKERS[name](TEXT * 100)
    refused(RequestError, f"not valid {name}", TEXT, name)
    refused(RequestError, f"not valid {name}", b"\x00" * 100, name)
    refused(RequestError, f"not valid {name}", packed + b"garbage", name)
    if name != "zstd":  # whose reader gives what there is: no JSON text
        refused(RequestError, f"not valid {name}", packed[:-1], name)
        refused(RequestError, f"not valid {name}", packed[:-5], name)
        refused(RequestError, f"not valid {name}", b"", name)
    else:
        assert read(packed[:-5], name) != TEXT * 100
    flipped = bytearray(packed)
    flipped[-1 if name != "zstd" else 0] ^= 0xFF
    refused(RequestError, f"not valid {name}", bytes(flipped), name)


def test_a_window_that_takes_much_memory_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    refused(RequestError, "too much memory", packer.compress(TEXT) + packer.flush(), "zstd")


def test_the_largest_body_and_one_byte_more() -> None:
    for name, pack in PACKERS.items():
        assert len(read(pack(b"a" * LIMIT), name)) == LIMIT
        refused(RequestTooLarge, "larger than 1 MiB", pack(b"a" * (LIMIT + 1)), name)
    noise = random.Random(1).randbytes(LIMIT + 1)  # its packing is larger than itself
    refused(RequestTooLarge, "1 MiB", gzip.compress(noise), "gzip")
    refused(RequestTooLarge, "1 MiB", b" " * (LIMIT + 1))


def bomb(name: str, size: int) -> bytes:
    packer = {
        "gzip": lambda: zlib.compressobj(9, wbits=31),
        "deflate": lambda: zlib.compressobj(9),
        "zstd": lambda: zstandard.ZstdCompressor(level=3).compressobj(),
    }[name]()
    zeros = bytes(2**20)
    return b"".join([*(packer.compress(zeros) for _ in range(size // 2**20)), packer.flush()])


@pytest.mark.parametrize(
    "names", [("gzip",), ("deflate",), ("zstd",), ("gzip", "gzip"), ("zstd", "gzip"), ("zstd",) * 3], ids="+".join
)
def test_a_bomb_goes_off_in_a_small_room(names: tuple[str, ...]) -> None:
    packed = bomb(names[0], 2**28)
    for name in names[1:]:
        packed = PACKERS[name](packed)
    assert len(packed) < 2**23
    longest = 0.0

    async def run() -> None:
        nonlocal longest

        async def others() -> None:
            nonlocal longest
            while True:
                began_s = time.perf_counter()
                await asyncio.sleep(0)
                longest = max(longest, time.perf_counter() - began_s)

        waiting = asyncio.create_task(others())
        async with World(FakePool()).pipeline.open(Head("POST", "/v1/completions", "r1")) as lease:
            try:
                await read_body(lease, pieces(packed), ", ".join(names), 2**23)
            finally:
                waiting.cancel()

    tracemalloc.start()
    with pytest.raises(RequestTooLarge):
        asyncio.run(run())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3 * 2**23  # what came, what it became, and a piece
    assert longest < 0.1


def test_packing_of_nothing_over_and_over_lets_others_run() -> None:
    packed = gzip.compress(b"") * (LIMIT // 20 - 10)
    others_ran = 0

    async def run() -> None:
        nonlocal others_ran

        async def others() -> None:
            nonlocal others_ran
            while True:
                await asyncio.sleep(0)
                others_ran += 1

        waiting = asyncio.create_task(others())
        async with World(FakePool()).pipeline.open(Head("POST", "/v1/completions", "r1")) as lease:
            assert await read_body(lease, pieces(packed), "gzip", LIMIT) == b""
        waiting.cancel()

    asyncio.run(run())
    assert others_ran > 1000


def test_what_a_packed_body_becomes_counts_as_memory() -> None:
    packed = gzip.compress(b"a" * 2**21)
    refused(Overloaded, r"gateway\.max_bodies_mib", packed, "gzip", limit=2**22, max_body_mib=1, max_bodies_mib=1)


def test_a_body_that_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "READ_TIMEOUT_S", 0.1)
    world = World(FakePool())

    async def slow() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async def run() -> None:
        async with world.pipeline.open(Head("POST", "/v1/completions", "r1")) as lease:
            await read_body(lease, slow(), "gzip", LIMIT)

    with pytest.raises(RequestTimeout, match="did not arrive within"):
        asyncio.run(run())
    assert world.nothing_left()


@pytest.mark.parametrize("name", PACKERS)
def test_a_packed_request_reaches_the_replica_unpacked(name: str) -> None:
    world = RestWorld(FakePool(ANSWER))
    assert post(world, PACKERS[name](TEXT), headers={"content-encoding": name}).status_code == 200
    assert world.pool.seen[0][2] == TEXT


def test_what_clients_get_of_bad_packing() -> None:
    world = RestWorld(FakePool(), max_body_mib=1)
    answers = [
        post(world, TEXT, headers={"content-encoding": "br"}),
        post(world, TEXT, headers={"content-encoding": "gzip"}),
        post(world, zstd(TEXT)[:-3], headers={"content-encoding": "zstd"}),
        post(world, zstd(b" " * 2**21), headers={"content-encoding": "zstd"}),
    ]
    assert [answer.status_code for answer in answers] == [415, 400, 400, 413]
    assert answers[0].json()["error"]["code"] == "unsupported_encoding"
    assert world.pool.seen == []
