"""Mutual TLS between real processes of the expert plane: who is refused, in which words; rotation under traffic."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import torch

from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import StartupError, UncoveredExperts, WorkerLost
from cluster.tls.grpc_credentials import ExpertChannels
from routing.tokens.client import ExpertClient
from routing.tokens.link import WorkerLink
from routing.tokens.server import ExpertServer
from routing.tokens.wire import DispatchRequest, encode_request
from tests.certificates import DAY, Authority, MountedSecret
from tests.unit.routing.tokens.conftest import HIDDEN, MODEL, Cluster, rows

ALL = list(range(8))
OURS, OTHER = Authority("ours"), Authority("other")


def dispatch_is_right(client: ExpertClient, seed: int = 0) -> bool:
    hidden, ids, weights, expected = rows(4, seed)
    return torch.allclose(client.forward(1, hidden, ids, weights), expected, rtol=1e-4, atol=1e-5)


def ask(address: str, channels: ExpertChannels | None) -> None:
    """One request over a connection of its own, without any of the client's retries."""
    link = WorkerLink(address, MODEL, DispatchConfig(), channels)
    hidden, ids, weights, _ = rows(1)
    request = DispatchRequest(1, 1, 1, 5000, hidden, ids.to(torch.int16), weights, torch.float32)
    link.send(encode_request(request))
    try:
        assert link.receive(1, 10).output_TH.shape == (1, HIDDEN)
    finally:
        link.close()


class Stranger(ExpertChannels):
    """Shows what nobody of ours would: certificates that our own checks refuse to start with."""

    def __init__(self, pair: tuple[bytes, bytes] | None) -> None:
        self._pair = pair
        self._server_name = "deepsplit"

    def credentials(self) -> grpc.ChannelCredentials:
        cert_pem, key_pem = self._pair or (None, None)
        return grpc.ssl_channel_credentials(OURS.pem, key_pem, cert_pem)


REFUSED = r"it refused our certificate \(internal_tls.cert_file\); its log says why"


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (lambda: None, REFUSED),
        (lambda: OTHER.pair(), REFUSED),
        (lambda: OURS.pair(begins=-2 * DAY, ends=-DAY), REFUSED),
        (lambda: OURS.pair("somebody-else"), r"UNAUTHENTICATED: the caller's certificate is not for deepsplit"),
    ],
    ids=["no certificate", "other authority", "expired", "other name"],
)
def test_strangers_are_refused_and_the_worker_lives_on(
    cluster: Cluster, tmp_path: Path, pair: Callable[[], tuple[bytes, bytes] | None], expected: str
) -> None:
    tls = OURS.issue(tmp_path / "ours")
    worker = cluster.start("a", ALL, tls=tls)
    cluster.publish("a")
    client = cluster.client(tls)
    assert dispatch_is_right(client)
    for _ in range(3):
        with pytest.raises(WorkerLost, match=expected):
            ask(worker.address, Stranger(pair()))
    assert cluster.processes["a"].poll() is None
    ask(worker.address, ExpertChannels(tls))
    assert dispatch_is_right(client, seed=1)


def test_plain_clients_are_refused_and_told_why(cluster: Cluster, tmp_path: Path) -> None:
    tls = OURS.issue(tmp_path / "ours")
    worker = cluster.start("a", ALL, tls=tls)
    cluster.publish("a")
    with pytest.raises(WorkerLost, match="if it asks for TLS, internal_tls must be set here too"):
        ask(worker.address, None)
    with pytest.raises(UncoveredExperts, match=r"last lost: expert worker .*internal_tls must be set here too"):
        dispatch_is_right(cluster.client(uncovered_timeout_s=0.5))
    assert dispatch_is_right(cluster.client(tls))


def test_workers_without_tls_or_of_others_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    channels = ExpertChannels(OURS.issue(tmp_path / "ours"))
    plain = cluster.start("a", ALL)
    with pytest.raises(WorkerLost, match="it does not speak TLS; internal_tls must be set on both ends"):
        ask(plain.address, channels)
    other = cluster.start("b", ALL, tls=OTHER.issue(tmp_path / "other"))
    with pytest.raises(WorkerLost, match=r"its certificate is expired, not for .* or not from internal_tls\.ca_file"):
        ask(other.address, channels)
    renamed = OURS.issue(tmp_path / "renamed", "x").model_copy(update={"server_name": "x"})
    named = cluster.start("c", ALL, tls=renamed)
    with pytest.raises(WorkerLost, match=r"not for internal_tls\.server_name"):
        ask(named.address, channels)


def test_a_dead_worker_is_not_blamed_on_tls(cluster: Cluster, tmp_path: Path) -> None:
    tls = OURS.issue(tmp_path / "ours")
    worker = cluster.start("a", ALL, tls=tls)
    cluster.processes["a"].kill()
    cluster.processes["a"].wait()
    with pytest.raises(WorkerLost, match=r"^expert worker \S+: UNAVAILABLE"):
        ask(worker.address, ExpertChannels(tls))


def test_unusable_files_stop_the_client(cluster: Cluster, tmp_path: Path) -> None:
    tls = OURS.issue(tmp_path / "ours", ends=-DAY)
    with pytest.raises(StartupError, match=r"internal_tls\.cert_file \S+ expired on"):
        cluster.client(tls)


def test_unusable_files_stop_the_worker(tmp_path: Path) -> None:
    tls = OURS.issue(tmp_path / "ours")
    tls.key_file.write_bytes(OURS.pair()[1])
    server = ExpertServer(lambda layer, hidden_TH, ids_TK, weights_TK: hidden_TH, HIDDEN, MODEL, DispatchConfig(), tls)
    with pytest.raises(StartupError, match=r"internal_tls\.key_file \S+ is not the key of"):
        server.start("127.0.0.1")


def test_rotation_under_traffic_fails_no_dispatch(cluster: Cluster, tmp_path: Path) -> None:
    """New authority beside the old one, new pairs, then without the old authority; workers come and go throughout."""
    secret = MountedSecret(tmp_path / "secret")
    (old_cert, old_key), (new_cert, new_key) = OURS.pair(), OTHER.pair()
    secret.replace({"tls.crt": old_cert, "tls.key": old_key, "ca.crt": OURS.pem})
    tls = InternalTlsConfig(
        cert_file=secret.folder / "tls.crt", key_file=secret.folder / "tls.key", ca_file=secret.folder / "ca.crt"
    )
    cluster.start("w0", ALL, tls=tls)
    cluster.publish("w0")
    client = cluster.client(tls)
    results: list[bool] = []
    failures: list[BaseException] = []
    stop = threading.Event()

    def traffic() -> None:
        try:
            while not stop.is_set():
                results.append(dispatch_is_right(client, seed=len(results)))
        except BaseException as error:
            failures.append(error)

    def passes(count: int) -> None:
        """Wait for that many more dispatches."""
        wanted = len(results) + count
        while len(results) < wanted:
            assert not failures, failures
            stop.wait(0.005)

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        states = (
            {"tls.crt": old_cert, "tls.key": old_key, "ca.crt": OURS.pem + OTHER.pem},
            {"tls.crt": new_cert, "tls.key": new_key, "ca.crt": OURS.pem + OTHER.pem},
            {"tls.crt": new_cert, "tls.key": new_key, "ca.crt": OTHER.pem},
        )
        passes(20)
        for number, files in enumerate(states):
            secret.replace(files)
            passes(20)  # the open stream goes on
            cluster.start(f"w{number + 1}", ALL, tls=tls)
            cluster.publish(f"w{number}", f"w{number + 1}")  # a new connection to each new worker
            passes(20)
            cluster.processes[f"w{number}"].kill()
            passes(20)
            cluster.publish(f"w{number + 1}")
            passes(20)
    finally:
        stop.set()
        thread.join(60)
    assert not failures
    assert all(results)
    with pytest.raises(WorkerLost, match="its certificate is"):  # the last worker shows the new authority's pair
        ask(cluster.endpoints["w3"].address, Stranger((old_cert, old_key)))
