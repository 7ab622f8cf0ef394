"""Certificate files: read, held against each other and the clock, and what is wrong with them in an operator's words.

Two uses: `gateway.tls` (one key pair that clients see) and `internal_tls` (one pair that every process of the cluster
shows, as server and as client, and the authorities that peers' pairs must come from).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cluster.config import InternalTlsConfig, ServerTls
from cluster.errors import StartupError


@dataclass(frozen=True)
class KeyPair:
    """A certificate chain (leaf first) and the leaf's private key, both PEM."""

    chain_pem: bytes
    key_pem: bytes
    not_after_s: float  # Unix time when the first certificate of the chain expires
    names: frozenset[str]  # DNS names of the leaf


@dataclass(frozen=True)
class InternalCertificates:
    """What a process of the cluster shows, and whom it believes."""

    pair: KeyPair
    authorities_pem: bytes


def load_public(tls: ServerTls, now_s: float) -> KeyPair:
    """The pair that the gateway shows its clients. `now_s`: Unix time.

    Raises StartupError that names the file, its key in the configuration and the fix.
    """
    return _load_pair(tls.cert_file, tls.key_file, "gateway.tls", now_s)


def load_internal(tls: InternalTlsConfig, now_s: float) -> InternalCertificates:
    """Pair and authorities for mutual TLS; a peer with the same files has accepted them in a trial handshake.

    `now_s`: Unix time. Raises StartupError that names the file, its key in the configuration and the fix.
    """
    pair = _load_pair(tls.cert_file, tls.key_file, "internal_tls", now_s)
    authorities_pem = _read(tls.ca_file, "internal_tls.ca_file")
    _certificates(authorities_pem, f"internal_tls.ca_file {tls.ca_file}")
    if tls.server_name.lower() not in pair.names:
        shown = ", ".join(sorted(pair.names)) or "no DNS name"
        raise StartupError(
            f"internal_tls.cert_file {tls.cert_file} is for {shown}, but peers "
            f"expect {tls.server_name}: issue it with that subject alternative name, or set internal_tls.server_name"
        )
    try:
        _shake_hands(server_context(tls), client_context(tls), tls.server_name)
    except ssl.SSLError as error:
        reason = getattr(error, "verify_message", None) or error.reason or str(error)
        raise StartupError(
            f"internal_tls.cert_file {tls.cert_file} would be refused by its peers ({reason}): it must be issued by an "
            f"authority in internal_tls.ca_file {tls.ca_file}, for use as server and as client"
        ) from None
    return InternalCertificates(pair, authorities_pem)


def expires_at_s(cert_file: Path) -> float:
    """Unix time when the first certificate of the chain in `cert_file` expires. Raises StartupError."""
    chain = _certificates(_read(cert_file, "certificate"), f"certificate {cert_file}")
    return min(certificate.not_valid_after_utc for certificate in chain).timestamp()


def public_context(tls: ServerTls) -> ssl.SSLContext:
    """A server's context for clients without certificates. Raises ssl.SSLError or OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    context.set_alpn_protocols(["http/1.1"])
    return context


def server_context(tls: InternalTlsConfig) -> ssl.SSLContext:
    """A server's context that believes only peers with a certificate of ours. Raises ssl.SSLError or OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    context.load_verify_locations(tls.ca_file)
    context.verify_mode = ssl.CERT_REQUIRED
    # A resumed session is not verified again, and would outlive the removal of its authority.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    return context


def client_context(tls: InternalTlsConfig) -> ssl.SSLContext:
    """A client's context that shows our certificate and believes only ours. Raises ssl.SSLError or OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_cert_chain(tls.cert_file, tls.key_file)
    context.load_verify_locations(tls.ca_file)
    return context


def _load_pair(cert_file: Path, key_file: Path, section: str, now_s: float) -> KeyPair:
    where, key_where = f"{section}.cert_file {cert_file}", f"{section}.key_file {key_file}"
    chain_pem, key_pem = _read(cert_file, f"{section}.cert_file"), _read(key_file, f"{section}.key_file")
    chain = _certificates(chain_pem, where)
    try:
        key = load_pem_private_key(key_pem, password=None)
    except TypeError:
        raise StartupError(f"{key_where} is encrypted: give the key without a passphrase") from None
    except ValueError:
        raise StartupError(f"{key_where} holds no private key in PEM") from None
    if not isinstance(key, (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey)):
        raise StartupError(f"{key_where} is of a kind that gRPC does not speak: use ECDSA (P-256) or RSA")
    matching = [certificate.public_key() == key.public_key() for certificate in chain]
    if not matching[0]:
        fix = "put its certificate first in the chain" if any(matching) else "give the pair that was issued together"
        raise StartupError(f"{key_where} is not the key of {where}: {fix}")
    for certificate in chain:
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if now_s > ends.timestamp():
            raise StartupError(f"{where} expired on {_day(ends)}: renew it (this host's clock says {_day(now_s)})")
        if now_s < begins.timestamp():
            raise StartupError(f"{where} is valid only from {_day(begins)}: this host's clock says {_day(now_s)}")
    return KeyPair(chain_pem, key_pem, min(c.not_valid_after_utc for c in chain).timestamp(), _dns_names(chain[0]))


def _read(path: Path, key: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"cannot read {key} {path}: {error.strerror}") from None


def _certificates(pem: bytes, where: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise StartupError(f"{where} holds no certificate in PEM") from None


def _dns_names(certificate: x509.Certificate) -> frozenset[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return frozenset()
    return frozenset(name.lower() for name in extension.value.get_values_for_type(x509.DNSName))


def _day(moment: datetime | float) -> str:
    found = moment if isinstance(moment, datetime) else datetime.fromtimestamp(moment, UTC)
    return f"{found:%Y-%m-%d %H:%M} UTC"


def _shake_hands(server: ssl.SSLContext, client: ssl.SSLContext, server_name: str) -> None:
    """A whole TLS handshake in memory. Raises the ssl.SSLError of whichever side refuses."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=server_name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    while ends:
        for end in tuple(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            ends.remove(end)
