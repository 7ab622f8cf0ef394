"""HTTP/1.1 on real sockets, with peers that do not play by the rules, and with some that are only unusual."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from cluster.tls.contexts import server_ssl_context
from deployments.hosting import http_connection
from deployments.hosting.http_connection import ConnectionBounds
from tests.certificates import Authority, public
from tests.unit.deployments.hosting.http_peers import GET, Application, echo, served, talk, until_closed


def test_headers_without_end_are_refused_at_their_bound() -> None:
    async def huge(port: int, _: Application) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\nx-filler: ")
        try:
            for _chunk in range(1000):  # 64 MB if nobody stops it
                writer.write(b"a" * 65536)
                await writer.drain()
        except ConnectionError:
            return
        raise AssertionError("all of it was read")

    talk(2, huge)


def test_a_large_body_in_the_same_packet_is_no_header() -> None:
    async def body(port: int, _: Application) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n" + b"b" * 200_000)
        assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
        writer.close()

    talk(2, body)


def test_a_peer_that_never_ends_its_headers_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADER_TIMEOUT_S", 1.0)

    async def slow(port: int, _: Application) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nho")
        assert await until_closed(reader) == b""
        again, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)  # a second request on a kept connection is under the same bound
        await again.readuntil(b"0\r\n\r\n")
        writer.write(b"GET / HT")
        assert await until_closed(again) == b""

    talk(2, slow)


@pytest.mark.parametrize("kept", [False, True])
def test_a_quiet_connection_is_closed_in_its_time(kept: bool) -> None:
    async def quiet(port: int, _: Application) -> None:
        loop = asyncio.get_running_loop()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        if kept:
            writer.write(GET)
            await reader.readuntil(b"0\r\n\r\n")
        began_s = loop.time()
        assert await until_closed(reader) == b""
        assert (0.7 if kept else 0.2) < loop.time() - began_s < 5
        writer.close()

    talk(2, quiet, ConnectionBounds(idle_timeout_s=0.8, first_request_timeout_s=0.3))


OURS = Authority("ours")
SIZE = 16 << 20


def slow_peer(port: int, secure: bool) -> socket.socket:
    """A connection whose peer's kernel takes a few KiB at once, with a request on it."""
    peer = socket.socket()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    peer.settimeout(20)
    peer.connect(("127.0.0.1", port))
    if secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        peer = context.wrap_socket(peer)
    peer.sendall(GET)
    return peer


Reads = Callable[[int, Application], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def serve_slow_peer(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[Reads, bool], None]:
    """Serves SIZE bytes to a peer in a thread, on either loop; Ray Serve's replicas use uvloop."""

    def run(reads: Reads, secure: bool) -> None:
        tls = server_ssl_context(public(OURS.issue(tmp_path))) if secure else None

        async def serve() -> None:
            app = Application(SIZE)
            async with served(app, ConnectionBounds(write_stall_s=0.4), tls) as port:
                await asyncio.to_thread(reads, port, app)

        with asyncio.Runner(loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None) as runner:
            runner.run(serve())

    return run


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("reads_first", [0, 100_000])
def test_a_reader_that_stalls_is_cut_off(
    reads_first: int, secure: bool, serve_slow_peer: Callable[[Reads, bool], None]
) -> None:
    def stall(port: int, app: Application) -> None:
        with slow_peer(port, secure) as peer:
            got = 0
            while got < reads_first:
                got += len(peer.recv(4096))
            began_s = time.monotonic()
            time.sleep(0.1)
            assert app.running
            while app.running:
                time.sleep(0.01)
                assert time.monotonic() - began_s < 10
            assert time.monotonic() - began_s > 0.3

    serve_slow_peer(stall, secure)


@pytest.mark.parametrize("secure", [False, True])
def test_a_reader_that_is_slow_and_steady_gets_it_all(
    secure: bool, serve_slow_peer: Callable[[Reads, bool], None]
) -> None:
    def slow(port: int, app: Application) -> None:
        with slow_peer(port, secure) as peer:
            got = 0
            until_s = time.monotonic() + 2.0  # five times the bound, in which the answer's writer never gets on
            while time.monotonic() < until_s:
                got += len(peer.recv(4096))
                time.sleep(0.02)
            assert app.running
            assert got < 1 << 20
            while not (data := peer.recv(1 << 20)).endswith(b"0\r\n\r\n"):
                assert data
                got += len(data)
            assert got + len(data) > SIZE

    serve_slow_peer(slow, secure)


async def until_cut(writer: asyncio.StreamWriter, piece: bytes) -> None:
    """Writes on and on."""
    async with asyncio.timeout(20):
        with suppress(ConnectionError):
            while True:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)


CHUNKED = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n"


@pytest.mark.parametrize(
    "trailers", [b"0\r\n" + b"x: y\r\n" * 10_000, b"0\r\nx: " + b"y" * 60_000, b"1;e=" + b"e" * 60_000],
    ids=["many trailers", "a long trailer", "a long extension"],
)  # fmt: skip
def test_what_is_no_body_has_no_room_behind_a_head_either(trailers: bytes) -> None:
    async def endless(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED + trailers)
        end = b"x: y\r\n" * 10_000 if trailers.endswith(b"\n") else trailers[-1:] * 60_000
        await until_cut(writer, end)

    async def run() -> None:
        async with served(echo) as port:
            tracemalloc.start()
            await endless(port)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
            tracemalloc.stop()

    asyncio.run(run())


def test_a_few_trailers_are_no_headers() -> None:
    async def run() -> None:
        async with served(echo) as port:
            _, said = await ask(port, CHUNKED + b"0\r\nx-late: 1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
            assert (said["body"], said["names"]) == ("a", ["host", "transfer-encoding"])

    asyncio.run(run())


def test_the_rest_of_a_body_that_nobody_reads_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "UNREAD_BODY_TIMEOUT_S", 0.4)
    chunk = b"10000\r\n" + b"b" * 65536 + b"\r\n"

    async def never_ends(port: int, app: Application) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED)
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        await until_cut(writer, chunk)

    async def ends(port: int, app: Application) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(CHUNKED)
        await reader.readuntil(b"0\r\n\r\n")
        writer.write(chunk + b"0\r\n\r\n")
        await asyncio.sleep(0.6)
        writer.write(GET)  # the connection is as good as before
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()

    talk(2, never_ends)
    talk(2, ends)


def test_what_follows_a_request_does_not_end_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty line, as old clients send it behind a body, or a further request's beginning."""
    monkeypatch.setattr(http_connection, "HEADER_TIMEOUT_S", 0.2)

    async def follows(port: int, app: Application) -> None:
        for what, closed in ((b"\r\n", False), (b"GET / HT", True)):
            app.hold.clear()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(GET)
            await asyncio.sleep(0.05)
            writer.write(what)
            await asyncio.sleep(0.6)
            app.hold.set()
            assert (await reader.readuntil(b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")
            if closed:
                assert await until_closed(reader) == b""  # the beginning never went on
            writer.close()

    talk(2, follows)


def test_a_body_behind_another_request_has_all_the_time_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "UNREAD_BODY_TIMEOUT_S", 0.1)
    monkeypatch.setattr(http_connection, "HEADER_TIMEOUT_S", 0.1)

    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await ask_on(reader, writer, PLAIN + IN_CHUNKS[:-20]))[1]["body"] == BODY.decode()
        await asyncio.sleep(0.4)
        assert (await ask_on(reader, writer, IN_CHUNKS[-20:]))[1]["body"] == BODY.decode()
        writer.close()

    on_a_server(test)


# --- offers of another protocol ---

JAVA = (
    b"POST /v1/x HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\n%s\r\nHost: localhost:8000\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\n"
    b"User-Agent: Java-http-client/21.0.5\r\nContent-Type: application/json\r\n\r\n"
)
BODY = b'{"prompt": "hello"}'
PLAIN = JAVA % b"Content-Length: 19" + BODY
IN_CHUNKS = JAVA % b"Transfer-encoding: chunked" + b"5\r\n" + BODY[:5] + b"\r\ne\r\n" + BODY[5:] + b"\r\n0\r\n\r\n"


async def ask(port: int, *packets: bytes) -> tuple[bytes, dict]:
    """Head and JSON body of the answer, which has a length."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return await ask_on(reader, writer, *packets)
    finally:
        writer.close()


async def ask_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *packets: bytes) -> tuple[bytes, dict]:
    for packet in packets:
        writer.write(packet)
        await writer.drain()
        await asyncio.sleep(0.002 if len(packets) > 1 else 0)
    async with asyncio.timeout(10):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        return head, json.loads(await reader.readexactly(length))


def on_a_server(test: Callable[[int], Awaitable[None]]) -> None:
    async def run() -> None:
        async with served(echo) as port:
            await test(port)

    asyncio.run(run())


@pytest.mark.parametrize("request_bytes", [PLAIN, IN_CHUNKS], ids=["with a length", "in chunks"])
@pytest.mark.parametrize("cuts", ["none", "after the head", "in the head", "in the offer", "everywhere"])
def test_an_offer_of_http_2_is_answered_as_http_1(request_bytes: bytes, cuts: str) -> None:
    at = {"after the head": request_bytes.index(b"\r\n\r\n") + 4, "in the head": 60,
          "in the offer": request_bytes.index(b"h2c") + 1}.get(cuts, len(request_bytes))  # fmt: skip
    packets = [request_bytes[:at], request_bytes[at:]]
    if cuts == "everywhere":
        packets = [request_bytes[i : i + 1] for i in range(len(request_bytes))]

    async def test(port: int) -> None:
        head, said = await ask(port, *(packet for packet in packets if packet))
        assert head.startswith(b"http/1.1 200")
        assert (said["method"], said["path"], said["body"]) == ("POST", "/v1/x", BODY.decode())
        assert not {"upgrade", "http2-settings"} & set(said["names"])
        assert {"host", "user-agent", "content-type"} <= set(said["names"])

    on_a_server(test)


def test_offers_come_again_and_again_on_one_connection() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for request in (PLAIN, IN_CHUNKS, PLAIN):
            assert (await ask_on(reader, writer, request))[1]["body"] == BODY.decode()
        writer.write(PLAIN + IN_CHUNKS + PLAIN)  # and pipelined
        for _ in range(3):
            assert (await ask_on(reader, writer))[1]["body"] == BODY.decode()
        writer.close()

    on_a_server(test)


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13", ["host", "sec-websocket-version"]),
        (b"connection: keep-alive, Upgrade\r\nupgrade: h2c", ["host", "connection"]),
        (b"connection: upgrade\r\nconnection: keep-alive\r\nupgrade: TLS/1.3, h2c", ["host", "connection"]),
        (b"upgrade: h2c", ["host", "upgrade"]),  # without Connection it is no offer
    ],
)
def test_other_offers(lines: bytes, names: list[str]) -> None:
    async def test(port: int) -> None:
        head, said = await ask(port, b"GET /a?b=c HTTP/1.1\r\nhost: x\r\n" + lines + b"\r\n\r\n")
        assert head.startswith(b"http/1.1 200")
        assert (said["method"], said["path"], said["names"]) == ("GET", "/a", names)

    on_a_server(test)


def test_an_offer_on_a_connection_that_is_to_close() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PLAIN.replace(b"Connection: Upgrade", b"Connection: close, Upgrade"))
        assert b"connection: close" in (await until_closed(reader)).lower()
        writer.close()

    on_a_server(test)


def test_a_head_with_an_offer_is_bounded_like_any_other() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(PLAIN.partition(b"\r\n\r\n")[0] + b"\r\nx: " + b"y" * 100_000)
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 400")
        writer.close()

    on_a_server(test)


def test_connect_is_no_offer() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await until_closed(reader)).startswith(b"HTTP/1.1 400")
        writer.close()

    on_a_server(test)


# --- HTTP/1.0 ---


@pytest.mark.parametrize("keep_alive", [b"", b"connection: keep-alive\r\n"])
@pytest.mark.parametrize("path", [b"/stream", b"/whole"])
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_http_1_0_gets_no_chunks_and_an_end(method: bytes, path: bytes, keep_alive: bytes) -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        length = b"content-length: 1\r\n\r\na" if method == b"POST" else b"\r\n"
        writer.write(b"%s %s HTTP/1.0\r\n%s%s" % (method, path, keep_alive, length))
        head, _, body = (await until_closed(reader)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"transfer-encoding" not in head.lower()
        assert (b"content-length" in head.lower()) == (path == b"/whole")
        assert b"connection: close" in head.lower()
        assert json.loads(body)["body"] == ("a" if method == b"POST" else "")
        writer.close()

    on_a_server(test)


def test_http_1_0_head_and_http_1_1_are_as_ever() -> None:
    async def test(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HEAD /stream HTTP/1.0\r\n\r\n")
        assert (await until_closed(reader)).endswith(b"\r\n\r\n")
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /stream HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"transfer-encoding: chunked" in await reader.readuntil(b"\r\n\r\n")
        writer.close()

    on_a_server(test)
