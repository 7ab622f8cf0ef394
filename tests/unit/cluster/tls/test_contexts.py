"""Real handshakes: who is let in, and what a change of the files does to connections to come."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import aiohttp
import pytest
import uvicorn
import uvloop

from cluster.config import InternalTlsConfig
from cluster.errors import StartupError
from cluster.tls.contexts import internal_client_ssl_context, internal_server_ssl_context, server_ssl_context
from cluster.tls.grpc_credentials import ExpertChannels, expert_server_credentials, public_server_credentials
from tests.certificates import DAY, Authority, public, serial_in, shown_serial

OURS, OTHER = Authority("ours"), Authority("other")


@pytest.fixture
def tls(tmp_path: Path) -> InternalTlsConfig:
    return OURS.issue(tmp_path / "ours")


Run = Callable[[Coroutine[None, None, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a coroutine on either loop; Ray Serve's replicas use uvloop, whose TLS is its own."""

    def run_in_new_loop(main: Coroutine[None, None, None]) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop if request.param == "uvloop" else None) as runner:
            runner.run(main)

    return run_in_new_loop


async def answer(scope: dict[str, object], receive: object, send: object) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})  # type: ignore[operator]
    await send({"type": "http.response.body", "body": b"ok"})  # type: ignore[operator]


@contextlib.asynccontextmanager
async def uvicorn_with(context: ssl.SSLContext) -> AsyncIterator[str]:
    config = uvicorn.Config(answer, "127.0.0.1", 0, lifespan="off", log_level="error")
    config.load()
    config.ssl = context
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"https://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    await task


async def get(url: str, context: ssl.SSLContext) -> str:
    async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as response:
        return await response.text()


def plain_client(*, pair: InternalTlsConfig | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=OURS.pem.decode())
    if pair is not None:
        context.load_cert_chain(pair.cert_file, pair.key_file)
    return context


def test_http_between_ours(run: Run, tls: InternalTlsConfig, tmp_path: Path) -> None:
    async def main() -> None:
        async with uvicorn_with(internal_server_ssl_context(tls)) as url:
            assert await get(url, internal_client_ssl_context(tls)) == "ok"
            assert await get(url.replace("127.0.0.1", "localhost"), internal_client_ssl_context(tls)) == "ok"
            strangers = {
                "none": plain_client(),
                "name": plain_client(pair=OURS.issue(tmp_path / "name", "somebody-else")),
                "expired": plain_client(pair=OURS.issue(tmp_path / "expired", ends=-DAY)),
                "authority": plain_client(pair=OTHER.issue(tmp_path / "other")),
            }
            for who, context in strangers.items():
                with pytest.raises((aiohttp.ClientError, ConnectionError)):
                    assert await get(url, context) == "", who
            assert await get(url, internal_client_ssl_context(tls)) == "ok"

    run(main())


def test_http_client_refuses_a_server_of_another_name(run: Run, tls: InternalTlsConfig, tmp_path: Path) -> None:
    async def main() -> None:
        theirs = OURS.issue(tmp_path / "theirs", "somebody-else")  # its address is in the certificate: not enough
        async with uvicorn_with(server_ssl_context(public(theirs))) as url:
            with pytest.raises(aiohttp.ClientConnectorCertificateError, match="not valid for 'deepsplit'"):
                await get(url, internal_client_ssl_context(tls))

    run(main())


def test_public_http_needs_no_client_certificate_and_follows_its_files(run: Run, tls: InternalTlsConfig) -> None:
    async def main() -> None:
        async with uvicorn_with(server_ssl_context(public(tls))) as url:
            address = url.removeprefix("https://").rstrip("/")
            assert await get(url, plain_client()) == "ok"
            for _ in range(2):
                OURS.issue(tls.cert_file.parent)
                assert await asyncio.to_thread(shown_serial, address) == serial_in(tls.cert_file)
            assert await get(url, plain_client()) == "ok"

    run(main())


def test_http_rotation_to_another_authority(run: Run, tls: InternalTlsConfig, tmp_path: Path) -> None:
    async def main() -> None:
        client = internal_client_ssl_context(tls)
        former = plain_client(pair=OURS.issue(tmp_path / "former"))
        former.load_verify_locations(cadata=OTHER.pem.decode())
        async with uvicorn_with(internal_server_ssl_context(tls)) as url:
            assert await get(url, client) == await get(url, former) == "ok"
            OTHER.issue(tls.cert_file.parent)
            assert await get(url, client) == "ok"
            with pytest.raises((aiohttp.ClientError, ConnectionError)):
                await get(url, former)

    run(main())


@pytest.mark.parametrize(
    "make", [expert_server_credentials, ExpertChannels, internal_server_ssl_context, internal_client_ssl_context]
)
def test_unusable_files_stop_the_start(tls: InternalTlsConfig, make: type) -> None:
    tls.key_file.write_bytes(OURS.pair()[1])
    with pytest.raises(StartupError, match=r"internal_tls\.key_file"):
        make(tls)


@pytest.mark.parametrize("make", [public_server_credentials, server_ssl_context])
def test_unusable_public_files_stop_the_start(tls: InternalTlsConfig, make: type) -> None:
    tls.cert_file.unlink()
    with pytest.raises(StartupError, match=r"gateway\.tls\.cert_file"):
        make(public(tls))
