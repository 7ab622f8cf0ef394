"""The HTTP server: its addresses, and its end."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cluster.errors import StartupError
from deployments.hosting.http_server import HttpServer
from tests.unit.deployments.hosting.http_peers import GET, Application, until_refused


def test_stop_lets_a_running_request_end_within_the_grace() -> None:
    async def run() -> bytes:
        app = Application()
        app.hold.clear()
        server = HttpServer(app)
        port = await server.start("127.0.0.1", 0, "gateway.port")
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        while not app.running:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(server.stop(20))
        await until_refused(port)
        app.hold.set()
        answer = await reader.read()
        await stopping
        return answer

    assert asyncio.run(run()).endswith(b"2\r\nxx\r\n0\r\n\r\n")


def test_a_port_in_use_names_the_key_and_a_shared_one_is_shared() -> None:
    async def run() -> None:
        first, second, third = HttpServer(Application()), HttpServer(Application()), HttpServer(Application())
        port = await first.start("127.0.0.1", 0, "gateway.port", share_port=True)
        assert await second.start("127.0.0.1", port, "gateway.port", share_port=True) == port
        with pytest.raises(StartupError, match=rf"cannot listen on 127\.0\.0\.1:{port}: the port is in use; see gate"):
            await third.start("127.0.0.1", port, "gateway.port")
        await first.stop(0)
        await second.stop(0)

    asyncio.run(run())


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.77:0: .*; see gateway\.port"):
        asyncio.run(HttpServer(Application()).start("192.0.2.77", 0, "gateway.port"))


def addresses(monkeypatch: pytest.MonkeyPatch, *found: tuple[int, tuple[object, ...]]) -> None:
    """What `localhost` means on this machine."""
    listed = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: listed)


V4, V6 = (socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0))
NOT_OURS = (socket.AF_INET, ("192.0.2.77", 0))


@pytest.mark.parametrize("found", [(V6, V4), (V4, V6), (V4, V4, V6), (NOT_OURS, V4, V6)])
def test_a_name_is_listened_on_at_each_of_its_addresses(
    found: tuple[tuple[int, tuple[object, ...]], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        server = HttpServer(Application())
        port = await server.start("localhost", 0, "gateway.port")
        for address in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(address, port)
            writer.write(GET)
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            writer.close()
        server.close_listener()
        for address in ("127.0.0.1", "::1"):
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection(address, port)
        await server.stop(0)

    addresses(monkeypatch, *found)
    asyncio.run(run())


def test_a_machine_without_one_of_the_families(monkeypatch: pytest.MonkeyPatch) -> None:
    class Socket(socket.socket):
        def __init__(self, family: int = -1, *more: int, **named: object) -> None:
            if family == socket.AF_INET6:
                raise OSError(97, "Address family not supported by protocol")
            super().__init__(family, *more, **named)  # type: ignore[arg-type]

    async def run() -> None:
        server = HttpServer(Application())
        port = await server.start("localhost", 0, "gateway.port")
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await server.stop(0)

    addresses(monkeypatch, V6, V4)
    monkeypatch.setattr(socket, "socket", Socket)
    asyncio.run(run())


def taken_on_ipv6_alone() -> tuple[socket.socket, int]:
    """A listener on ::1 and its port, which nothing on 127.0.0.1 has, not even a closed connection that still lingers.
    """
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port: int = free.getsockname()[1]
            other = socket.socket(socket.AF_INET6)
            other.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                other.bind(("::1", port))
            except OSError:
                other.close()
                continue
            other.listen()
            return other, port


def test_one_address_of_a_name_in_use_is_an_error_and_leaves_the_others_free(monkeypatch: pytest.MonkeyPatch) -> None:
    other, port = taken_on_ipv6_alone()
    addresses(monkeypatch, (socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port, 0, 0)))
    with other:
        with pytest.raises(StartupError, match=r"the port is in use; see gateway\.port"):
            asyncio.run(HttpServer(Application()).start("localhost", port, "gateway.port"))
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))


def test_no_address_of_a_name_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses(monkeypatch, NOT_OURS, NOT_OURS)
    with pytest.raises(StartupError, match=r"Cannot assign requested address; see gateway\.port"):
        asyncio.run(HttpServer(Application()).start("elsewhere", 0, "gateway.port"))


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on nobody\.invalid:1: .*; see gateway\.port"):
        asyncio.run(HttpServer(Application()).start("nobody.invalid", 1, "gateway.port"))
