"""What is wrong with certificate files is said before a server starts, with the file, its key and the fix."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cluster.config import InternalTlsConfig
from cluster.errors import StartupError
from cluster.tls.certificates import expires_at_s, load_internal, load_public
from tests.certificates import DAY, Authority, public

OURS, OTHER = Authority("ours"), Authority("other")


def test_good_files_are_read_whole(tmp_path: Path) -> None:
    tls = OURS.issue(tmp_path)
    ours = load_internal(tls, time.time())
    assert ours.pair.chain_pem == tls.cert_file.read_bytes()
    assert ours.pair.key_pem == tls.key_file.read_bytes()
    assert ours.authorities_pem == OURS.pem
    assert ours.pair.names == {"deepsplit"}
    assert load_public(public(tls), time.time()) == ours.pair


def test_expiry_is_the_first_of_the_chain(tmp_path: Path) -> None:
    tls = OURS.issue(tmp_path, ends=timedelta(hours=5))
    tls.cert_file.write_bytes(tls.cert_file.read_bytes() + OURS.pem)
    expected = datetime.now(UTC).timestamp() + 5 * 3600
    assert expires_at_s(tls.cert_file) == pytest.approx(expected, abs=60)
    assert load_internal(tls, time.time()).pair.not_after_s == expires_at_s(tls.cert_file)


def _missing(tls: InternalTlsConfig) -> None:
    tls.cert_file.unlink()


def _key_missing(tls: InternalTlsConfig) -> None:
    tls.key_file.unlink()


def _ca_is_a_folder(tls: InternalTlsConfig) -> None:
    tls.ca_file.unlink()
    tls.ca_file.mkdir()


def _not_pem(tls: InternalTlsConfig) -> None:
    tls.cert_file.write_bytes(b"hello")


def _half_written(tls: InternalTlsConfig) -> None:
    tls.cert_file.write_bytes(tls.cert_file.read_bytes()[:200])


def _key_not_pem(tls: InternalTlsConfig) -> None:
    tls.key_file.write_bytes(tls.cert_file.read_bytes())


def _ca_empty(tls: InternalTlsConfig) -> None:
    tls.ca_file.write_bytes(b"")


def _encrypted(tls: InternalTlsConfig) -> None:
    _, key_pem = OURS.pair(passphrase=b"secret")
    tls.key_file.write_bytes(key_pem)


def _other_kind(tls: InternalTlsConfig) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    tls.key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _mismatched(tls: InternalTlsConfig) -> None:
    tls.cert_file.write_bytes(OURS.pair()[0])


def _authority_first(tls: InternalTlsConfig) -> None:
    tls.cert_file.write_bytes(OURS.pem + tls.cert_file.read_bytes())


def _expired(tls: InternalTlsConfig) -> None:
    OURS.issue(tls.cert_file.parent, ends=-DAY)


def _not_yet(tls: InternalTlsConfig) -> None:
    cert_pem, key_pem = OURS.pair(begins=DAY, ends=2 * DAY)
    tls.cert_file.write_bytes(cert_pem)
    tls.key_file.write_bytes(key_pem)


def _other_name(tls: InternalTlsConfig) -> None:
    OURS.issue(tls.cert_file.parent, "gateway")


def _other_authority(tls: InternalTlsConfig) -> None:
    tls.ca_file.write_bytes(OTHER.pem)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_missing, r"cannot read internal_tls.cert_file \S+/tls.crt: No such file"),
        (_key_missing, r"cannot read internal_tls.key_file \S+/tls.key: No such file"),
        (_ca_is_a_folder, r"cannot read internal_tls.ca_file \S+/ca.crt: Is a directory"),
        (_not_pem, r"internal_tls.cert_file \S+/tls.crt holds no certificate in PEM"),
        (_half_written, r"internal_tls.cert_file \S+/tls.crt holds no certificate in PEM"),
        (_key_not_pem, r"internal_tls.key_file \S+/tls.key holds no private key in PEM"),
        (_ca_empty, r"internal_tls.ca_file \S+/ca.crt holds no certificate in PEM"),
        (_encrypted, r"internal_tls.key_file \S+/tls.key is encrypted: give the key without a passphrase"),
        (_other_kind, r"internal_tls.key_file \S+ is of a kind that gRPC does not speak: use ECDSA"),
        (_mismatched, r"internal_tls.key_file \S+ is not the key of internal_tls.cert_file \S+: give the pair"),
        (_authority_first, r"is not the key of internal_tls.cert_file \S+: put its certificate first in the chain"),
        (_expired, r"internal_tls.cert_file \S+ expired on \d{4}-\d\d-\d\d .*: renew it"),
        (_not_yet, r"internal_tls.cert_file \S+ is valid only from .*: this host's clock says"),
        (_other_name, r"internal_tls.cert_file \S+ is for gateway, but peers expect deepsplit: issue it with"),
        (_other_authority, r"would be refused by its peers \(.*issuer.*\): .* in internal_tls.ca_file \S+/ca.crt"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, spoil: Callable[[InternalTlsConfig], None], expected: str) -> None:
    tls = OURS.issue(tmp_path)
    spoil(tls)
    with pytest.raises(StartupError, match=expected):
        load_internal(tls, time.time())


def test_the_gateways_files_are_named_by_their_own_keys(tmp_path: Path) -> None:
    tls = OURS.issue(tmp_path)
    _mismatched(tls)
    with pytest.raises(StartupError, match=r"gateway.tls.key_file \S+ is not the key of gateway.tls.cert_file"):
        load_public(public(tls), time.time())


def test_unreadable_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls = OURS.issue(tmp_path)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:  # tests may run as root, whom no mode stops
        if path == tls.key_file:
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(StartupError, match=r"cannot read internal_tls.key_file \S+/tls.key: Permission denied"):
        load_internal(tls, time.time())
