"""Certificates: `gateway.tls` and the section `internal_tls`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from cluster.config.section import Section


class ServerTls(Section):
    """The certificate that a server shows its clients. Files that change are read again for new connections."""

    cert_file: Path = Field(description="Certificate chain, PEM.")
    key_file: Path = Field(description="Private key, PEM.")

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, for whoever watches them."""
        return self.cert_file, self.key_file


class InternalTlsConfig(Section):
    """Mutual TLS between gateway, attention replicas and expert workers. Changed files serve new connections."""

    cert_file: Path = Field(description="This cluster's certificate, PEM; every process shows it, as server and "
                                        "as client.")
    key_file: Path = Field(description="Its private key, PEM.")
    ca_file: Path = Field(description="Authorities that peers' certificates must come from, PEM.")
    server_name: str = Field("deepsplit", description="DNS name in the certificate, which every peer must show.")

    @property
    def files(self) -> tuple[Path, ...]:
        """All files, for whoever watches them."""
        return self.cert_file, self.key_file, self.ca_file
