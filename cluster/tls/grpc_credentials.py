"""Credentials of gRPC servers and channels, with certificates that are read again when they change.

New connections use the newest usable files; open ones go on as they are. Every function here raises StartupError when
the files cannot be used at all; later, files that cannot be used leave the former ones in force.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import grpc

from cluster.config import InternalTlsConfig, ServerTls
from cluster.tls.certificates import InternalCertificates, KeyPair, load_internal, load_public
from cluster.tls.reloading import ReloadedFiles

_T = TypeVar("_T")


def public_server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """For a server whose clients show no certificate."""

    def configuration(pair: KeyPair) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(pair.key_pem, pair.chain_pem)])

    return _server_credentials(tls.files, lambda: load_public(tls, time.time()), configuration, mutual=False)


def expert_server_credentials(tls: InternalTlsConfig) -> grpc.ServerCredentials:
    """For a server whose clients must show a certificate of ours. It must ask `peer_is` for their name besides."""

    def configuration(ours: InternalCertificates) -> grpc.ServerCertificateConfiguration:
        pairs = [(ours.pair.key_pem, ours.pair.chain_pem)]
        return grpc.ssl_server_certificate_configuration(pairs, root_certificates=ours.authorities_pem)

    return _server_credentials(
        tls.files, lambda: load_internal(tls, time.time()), configuration, mutual=True
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
        self._files = ReloadedFiles(tls.files, lambda: load_internal(tls, time.time()))

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
