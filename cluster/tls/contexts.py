"""`ssl` contexts for asyncio servers and clients (uvicorn, aiohttp), with certificates that are read again when they
change.

New connections use the newest usable files; open ones go on as they are. Every function here raises StartupError when
the files cannot be used at all; later, files that cannot be used leave the former ones in force.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from typing import NoReturn, Self

from cluster.config import InternalTlsConfig, ServerTls
from cluster.errors import StartupError
from cluster.tls.certificates import client_context, load_internal, load_public, public_context, server_context
from cluster.tls.reloading import ReloadedFiles


def server_ssl_context(tls: ServerTls) -> ssl.SSLContext:
    """For an asyncio server (uvicorn) whose clients show no certificate."""

    def load() -> ssl.SSLContext:
        load_public(tls, time.time())
        return _made(lambda: public_context(tls))

    return _ReloadingContext.of(ssl.PROTOCOL_TLS_SERVER, ReloadedFiles(tls.files, load))


def internal_server_ssl_context(tls: InternalTlsConfig) -> ssl.SSLContext:
    """For an asyncio server whose clients must show a certificate of ours."""

    def load() -> ssl.SSLContext:
        load_internal(tls, time.time())
        context = _made(lambda: server_context(tls))
        context.sslobject_class = _peer_named(tls.server_name)
        return context

    return _ReloadingContext.of(ssl.PROTOCOL_TLS_SERVER, ReloadedFiles(tls.files, load))


def internal_client_ssl_context(tls: InternalTlsConfig) -> ssl.SSLContext:
    """For an asyncio client (aiohttp) of such a server: the URL's host does not matter, `server_name` does."""

    def load() -> ssl.SSLContext:
        load_internal(tls, time.time())
        return _made(lambda: client_context(tls))

    files = ReloadedFiles(tls.files, load)
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
