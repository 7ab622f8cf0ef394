"""Certificate authorities and certificates for tests: `Authority("ours").issue(folder)` writes a pair and its CA."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from cluster.config import InternalTlsConfig, ServerTls

DAY = timedelta(days=1)


class Authority:
    """A certificate authority of its own."""

    def __init__(self, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.now(UTC)
        self._certificate = (
            x509.CertificateBuilder()
            .subject_name(self._name).issuer_name(self._name).public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 365 * DAY).not_valid_after(now + 365 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )  # fmt: skip

    @property
    def pem(self) -> bytes:
        """The authority's own certificate."""
        return self._certificate.public_bytes(Encoding.PEM)

    def pair(
        self, name: str = "deepsplit", *, begins: timedelta = -DAY, ends: timedelta = DAY,
        passphrase: bytes | None = None,
    ) -> tuple[bytes, bytes]:  # fmt: skip
        """(certificate, key) in PEM for DNS `name` and 127.0.0.1, valid between two moments relative to now."""
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
        names: list[x509.GeneralName] = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])).issuer_name(self._name)
            .public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now + begins).not_valid_after(now + ends)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )  # fmt: skip
        locked: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
        return certificate.public_bytes(Encoding.PEM), key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked)

    def issue(self, folder: Path, name: str = "deepsplit", *, ends: timedelta = DAY) -> InternalTlsConfig:
        """A new pair and this authority as files in `folder`; what was there is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        cert_pem, key_pem = self.pair(name, begins=min(-DAY, ends - DAY), ends=ends)
        tls = InternalTlsConfig(cert_file=folder / "tls.crt", key_file=folder / "tls.key", ca_file=folder / "ca.crt")
        tls.cert_file.write_bytes(cert_pem)
        tls.key_file.write_bytes(key_pem)
        tls.ca_file.write_bytes(self.pem)
        return tls


def public(tls: InternalTlsConfig) -> ServerTls:
    """The same pair as a server shows it to clients without certificates."""
    return ServerTls(cert_file=tls.cert_file, key_file=tls.key_file)


class MountedSecret:
    """A folder filled as Kubernetes fills a mounted secret: links through `..data`, which is swapped at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._version = 0

    def replace(self, files: dict[str, bytes]) -> None:
        """All files at once, in a new folder."""
        self._version += 1
        version = self.folder / f"..v{self._version}"
        version.mkdir(parents=True)
        for name, content in files.items():
            (version / name).write_bytes(content)
            link = self.folder / name
            if not link.is_symlink():
                link.symlink_to(Path("..data") / name)
        fresh = self.folder / "..data_tmp"
        fresh.symlink_to(version.name)
        fresh.replace(self.folder / "..data")


def shown_serial(address: str) -> int:
    """Serial number of the certificate that a server shows now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")

    async def fetch() -> int:
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        return x509.load_der_x509_certificate(der).serial_number

    return asyncio.run(fetch())


def serial_in(cert_file: Path) -> int:
    """Serial number of the first certificate in a file."""
    return x509.load_pem_x509_certificate(cert_file.read_bytes()).serial_number
