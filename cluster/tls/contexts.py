"""TLS for servers and clients, over gRPC and over HTTP, with certificates that are read again when their files change.

New connections use the newest usable files; open ones go on as they are. Every function here raises StartupError when
the files cannot be used at all; later, files that cannot be used leave the former ones in force.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, Self, TypeVar

import grpc

from cluster.config import InternalTlsConfig, ServerTls
from cluster.errors import StartupError
from cluster.tls.certificates import (
    InternalCertificates,
    KeyPair,
    client_context,
    load_internal,
    load_public,
    public_context,
    server_context,
)  # fmt: skip
from cluster.tls.reloading import ReloadedFiles

_T = TypeVar("_T")

# --- gRPC --------------------------------------------------------------------------------------------------


def public_server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """For a server whose clients show no certificate."""

    def configuration(pair: KeyPair) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(pair.key_pem, pair.chain_pem)])

    return _server_credentials(_public_files(tls), lambda: load_public(tls, time.time()), configuration, mutual=False)


def expert_server_credentials(tls: InternalTlsConfig) -> grpc.ServerCredentials:
    """For a server whose clients must show a certificate of ours. It must ask `peer_is` for their name besides."""

    def configuration(ours: InternalCertificates) -> grpc.ServerCertificateConfiguration:
        pairs = [(ours.pair.key_pem, ours.pair.chain_pem)]
        return grpc.ssl_server_certificate_configuration(pairs, root_certificates=ours.authorities_pem)

    return _server_credentials(
        _internal_files(tls), lambda: load_internal(tls, time.time()), configuration, mutual=True
    )


def _server_credentials(
    paths: Sequence[Path],
    load: Callable[[], _T],
    configuration: Callable[[_T], grpc.ServerCertificateConfiguration],
    mutual: bool,
) -> grpc.ServerCredentials:
    # gRPC asks before each handshake.
    files = ReloadedFiles(paths, lambda: configuration(load()))
    return grpc.dynamic_ssl_server_credentials(files.current(), files.current, require_client_authentication=mutual)


def peer_is(server_name: str, auth_context: Mapping[str, Sequence[bytes]]) -> bool:
    """Whether the certificate that a gRPC client showed (`ServicerContext.auth_context()`) has this DNS name."""
    names = auth_context.get("x509_subject_alternative_name", ())
    return server_name.lower() in {name.decode(errors="replace").lower() for name in names}


class ExpertChannels:
    """Opens channels to servers with `expert_server_credentials`, each with the newest files.

    A channel keeps the files that it was opened with, for its reconnections too: open a new one instead. Files that
    are half-written at that moment leave the former ones in force.
    """

    def __init__(self, tls: InternalTlsConfig) -> None:
        self._server_name = tls.server_name
        self._files = ReloadedFiles(_internal_files(tls), lambda: load_internal(tls, time.time()))

    def credentials(self) -> grpc.ChannelCredentials:
        """Shows our certificate and accepts only servers of ours."""
        ours = self._files.current()
        return grpc.ssl_channel_credentials(ours.authorities_pem, ours.pair.key_pem, ours.pair.chain_pem)

    def options(self) -> list[tuple[str, str]]:
        """Channel options: the name that the server's certificate must have, whatever address it is reached at."""
        return [("grpc.ssl_target_name_override", self._server_name)]


def handshake_hint(details: str, secure: bool) -> str:
    """What a failed connection (gRPC's details of it) most likely means to an operator; empty if TLS has no part in it.

    `secure`: whether our end spoke TLS. A server's reasons for refusing a client are only in the server's log.
    """
    if "failed to connect" not in details:
        return ""
    if "WRONG_VERSION_NUMBER" in details:
        return ": it does not speak TLS; internal_tls must be set on both ends or on none"
    if "CERTIFICATE_VERIFY_FAILED" in details or "Hostname Verification" in details:
        return ": its certificate is expired, not for internal_tls.server_name, or not from internal_tls.ca_file"
    if "Socket closed" in details or "Connection reset" in details:
        if secure:
            return ": it refused our certificate (internal_tls.cert_file); its log says why"
        return ": if it asks for TLS, internal_tls must be set here too"
    return ""


# --- ssl: asyncio, uvicorn, aiohttp ------------------------------------------------------------------------


def server_ssl_context(tls: ServerTls) -> ssl.SSLContext:
    """For an asyncio server (uvicorn) whose clients show no certificate."""

    def load() -> ssl.SSLContext:
        load_public(tls, time.time())
        return _made(lambda: public_context(tls))

    return _ReloadingContext.of(ssl.PROTOCOL_TLS_SERVER, ReloadedFiles(_public_files(tls), load))


def internal_server_ssl_context(tls: InternalTlsConfig) -> ssl.SSLContext:
    """For an asyncio server whose clients must show a certificate of ours."""

    def load() -> ssl.SSLContext:
        load_internal(tls, time.time())
        context = _made(lambda: server_context(tls))
        context.sslobject_class = _peer_named(tls.server_name)
        return context

    return _ReloadingContext.of(ssl.PROTOCOL_TLS_SERVER, ReloadedFiles(_internal_files(tls), load))


def internal_client_ssl_context(tls: InternalTlsConfig) -> ssl.SSLContext:
    """For an asyncio client (aiohttp) of such a server: the URL's host does not matter, `server_name` does."""

    def load() -> ssl.SSLContext:
        load_internal(tls, time.time())
        return _made(lambda: client_context(tls))

    files = ReloadedFiles(_internal_files(tls), load)
    return _ReloadingContext.of(ssl.PROTOCOL_TLS_CLIENT, files, tls.server_name)


class _ReloadingContext(ssl.SSLContext):
    """Hands each new connection to a context made of the newest files.

    To a new one, and not to an old one with another `load_cert_chain`, because authorities can only be added to a
    context, never removed. What is set on this object itself (ALPN, ciphers) has no effect.
    """

    _files: ReloadedFiles[ssl.SSLContext]
    _server_name: str | None

    @classmethod
    def of(cls, protocol: int, files: ReloadedFiles[ssl.SSLContext], server_name: str | None = None) -> Self:
        """`server_name`: what clients check instead of the host they connect to."""
        made = cls(protocol)
        made._files, made._server_name = files, server_name
        return made

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, server_side: bool = False,
        server_hostname: str | bytes | None = None, session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:  # fmt: skip
        """As SSLContext's; what asyncio calls for each connection."""
        name = self._server_name or server_hostname
        return self._files.current().wrap_bio(incoming, outgoing, server_side, name, session)

    def wrap_socket(self, *_: object, **__: object) -> NoReturn:
        """Not for blocking sockets: nobody uses them here, and the check of the client's name does not reach them."""
        raise NotImplementedError("this context is for asyncio")


def _peer_named(name: str) -> type[ssl.SSLObject]:
    """A server's connections that check the client's name, as OpenSSL by itself checks only the server's."""

    class PeerNamed(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            fields = (self.getpeercert() or {}).get("subjectAltName", ())
            names = {str(field[1]).lower() for field in fields if field[0] == "DNS"}
            if name.lower() not in names:
                raise ssl.SSLCertVerificationError(f"the client's certificate is not for {name}")

    return PeerNamed


def _made(make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    try:
        return make()
    except OSError as error:  # ssl.SSLError is one: the files changed since they were checked
        raise StartupError(f"the certificate files changed while they were read: {error}") from None


def _public_files(tls: ServerTls) -> tuple[Path, ...]:
    return tls.cert_file, tls.key_file


def _internal_files(tls: InternalTlsConfig) -> tuple[Path, ...]:
    return tls.cert_file, tls.key_file, tls.ca_file
