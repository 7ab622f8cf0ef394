"""Real handshakes: who is let in, and what a change of the files does to connections to come."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cluster.config import InternalTlsConfig
from cluster.tls.grpc_credentials import (
    ExpertChannels,
    expert_server_credentials,
    peer_is,
    public_server_credentials,
)  # fmt: skip
from tests.certificates import DAY, Authority, MountedSecret, public, serial_in, shown_serial

OURS, OTHER = Authority("ours"), Authority("other")


@pytest.fixture
def tls(tmp_path: Path) -> InternalTlsConfig:
    return OURS.issue(tmp_path / "ours")


@contextlib.contextmanager
def serving(credentials: grpc.ServerCredentials) -> Iterator[str]:
    """A server that tells its caller whether its certificate is for `deepsplit`."""
    server = grpc.server(ThreadPoolExecutor(4))
    named = grpc.unary_unary_rpc_method_handler(
        lambda _, context: str(peer_is("deepsplit", context.auth_context())).encode()
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {"named": named}),))
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def call(address: str, credentials: grpc.ChannelCredentials, options: list[tuple[str, str]]) -> str:
    """One call over a connection of its own."""
    alone: list[tuple[str, str | int]] = [*options, ("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, credentials, alone) as channel:
        answer: bytes = channel.unary_unary("/t/named")(b"", timeout=10)
    return answer.decode()


def call_ours(address: str, tls: InternalTlsConfig) -> str:
    return call(address, ExpertChannels(tls).credentials(), ExpertChannels(tls).options())


def test_ours_reach_each_other_by_any_address(tls: InternalTlsConfig, tmp_path: Path) -> None:
    with serving(expert_server_credentials(tls)) as address:
        assert call_ours(address, tls) == "True"
        assert call_ours(address, OURS.issue(tmp_path / "another")) == "True"


def test_a_client_of_another_name_is_known_as_such(tls: InternalTlsConfig) -> None:
    cert_pem, key_pem = OURS.pair("somebody-else")
    with serving(expert_server_credentials(tls)) as address:
        theirs = grpc.ssl_channel_credentials(OURS.pem, key_pem, cert_pem)
        assert call(address, theirs, [("grpc.ssl_target_name_override", "deepsplit")]) == "False"


@pytest.mark.parametrize("who", ["no certificate", "other authority", "expired"])
def test_other_clients_are_refused(tls: InternalTlsConfig, who: str) -> None:
    pairs = {"other authority": OTHER.pair(), "expired": OURS.pair(begins=-2 * DAY, ends=-DAY)}
    cert_pem, key_pem = pairs.get(who, (None, None))
    theirs = grpc.ssl_channel_credentials(OURS.pem, key_pem, cert_pem)
    with serving(expert_server_credentials(tls)) as address:
        with pytest.raises(grpc.RpcError) as caught:
            call(address, theirs, [("grpc.ssl_target_name_override", "deepsplit")])
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert call_ours(address, tls) == "True"


def test_a_server_of_another_authority_or_name_is_refused(tls: InternalTlsConfig, tmp_path: Path) -> None:
    other = expert_server_credentials(OTHER.issue(tmp_path / "other"))
    with serving(other) as address, pytest.raises(grpc.RpcError, match="CERTIFICATE_VERIFY_FAILED"):
        call_ours(address, tls)
    renamed = OURS.issue(tmp_path / "renamed", "other-name").model_copy(update={"server_name": "other-name"})
    credentials = expert_server_credentials(renamed)
    with serving(credentials) as address, pytest.raises(grpc.RpcError, match="Hostname Verification Check failed"):
        call_ours(address, tls)


def test_a_changed_pair_serves_new_connections_of_open_servers(tls: InternalTlsConfig) -> None:
    with serving(expert_server_credentials(tls)) as address, serving(public_server_credentials(public(tls))) as other:
        for _ in range(2):
            OURS.issue(tls.cert_file.parent)
            for at in (address, other):
                assert shown_serial(at) == serial_in(tls.cert_file)
        assert call_ours(address, tls) == "True"


def test_rotation_to_another_authority(tmp_path: Path) -> None:
    """Both authorities are believed, then the pair changes, then the old authority is dropped."""
    secret = MountedSecret(tmp_path / "secret")
    old_cert, old_key = OURS.pair()
    new_cert, new_key = OTHER.pair()
    secret.replace({"tls.crt": old_cert, "tls.key": old_key, "ca.crt": OURS.pem})
    tls = InternalTlsConfig(
        cert_file=secret.folder / "tls.crt", key_file=secret.folder / "tls.key", ca_file=secret.folder / "ca.crt"
    )
    channels = ExpertChannels(tls)
    old_client = grpc.ssl_channel_credentials(OURS.pem + OTHER.pem, old_key, old_cert)
    with serving(expert_server_credentials(tls)) as address:
        for files in (
            {"tls.crt": old_cert, "tls.key": old_key, "ca.crt": OURS.pem + OTHER.pem},
            {"tls.crt": new_cert, "tls.key": new_key, "ca.crt": OURS.pem + OTHER.pem},
        ):
            secret.replace(files)
            assert call(address, channels.credentials(), channels.options()) == "True"
            assert call(address, old_client, channels.options()) == "True"
        secret.replace({"tls.crt": new_cert, "tls.key": new_key, "ca.crt": OTHER.pem})
        assert call(address, channels.credentials(), channels.options()) == "True"
        with pytest.raises(grpc.RpcError):
            call(address, old_client, channels.options())


def test_files_that_do_not_fit_together_leave_the_former_in_force(
    tls: InternalTlsConfig, caplog: pytest.LogCaptureFixture
) -> None:
    channels = ExpertChannels(tls)
    serial = serial_in(tls.cert_file)
    with serving(expert_server_credentials(tls)) as address:
        new_cert, new_key = OURS.pair()
        for cert in (new_cert[:300], new_cert):  # half-written, then without its key
            tls.cert_file.write_bytes(cert)
            assert call(address, channels.credentials(), channels.options()) == "True"
            assert shown_serial(address) == serial
        assert "is not the key of" in caplog.text
        tls.key_file.write_bytes(new_key)
        assert call(address, channels.credentials(), channels.options()) == "True"
        assert shown_serial(address) == serial_in(tls.cert_file) != serial


def test_async_servers_take_the_same_credentials(tls: InternalTlsConfig) -> None:
    async def handshake() -> tuple[int, int]:
        server = grpc.aio.server()
        port = server.add_secure_port("127.0.0.1:0", public_server_credentials(public(tls)))
        await server.start()
        address = f"127.0.0.1:{port}"
        first = await asyncio.to_thread(shown_serial, address)
        OURS.issue(tls.cert_file.parent)
        second = await asyncio.to_thread(shown_serial, address)
        await server.stop(0)
        return first, second

    before = serial_in(tls.cert_file)
    assert asyncio.run(handshake()) == (before, serial_in(tls.cert_file))
