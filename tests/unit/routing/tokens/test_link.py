"""One stream to a real worker process, worked by the threads that use it; and what happens while none does."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.config import DispatchConfig
from cluster.errors import FrameError, StalePlacement, StartupError, WorkerLost, WorkerSilent, WorkerUnusable
from routing.tokens import frame_stream
from routing.tokens.link import WorkerLink
from routing.tokens.link_poller import LinkPoller
from routing.tokens.wire import WireRows, pack_request
from tests.unit.routing.tokens.conftest import HIDDEN, MODEL, Cluster

KEEPALIVE = DispatchConfig(keepalive_interval_s=1.0, keepalive_timeout_s=1.0)


@pytest.fixture
def links() -> Iterator[Callable[..., WorkerLink]]:
    made: list[WorkerLink] = []
    poller = LinkPoller()

    def open_link(address: str, model: str = MODEL) -> WorkerLink:
        made.append(WorkerLink(address, model, KEEPALIVE, None, poller))
        return made[-1]

    yield open_link
    for link in made:
        link.close()
    poller.stop()


def frame(frame_id: int, rows: int = 1, expert: int = 0, layer: int = 1) -> bytes:
    """Rows of ones for one expert with weight 1: the answer is `expert` + 1 everywhere."""
    ones = WireRows.of(torch.ones(rows, HIDDEN), torch.float32)
    ids, weights = torch.full((rows, 1), expert, dtype=torch.int16), torch.ones(rows, 1)
    return pack_request(frame_id, 1, layer, 20_000, ones, None, ids.numpy(), weights.numpy(), torch.float32)


def tended(link: WorkerLink, seconds: float) -> None:
    """As the client's watchdog does it."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        link.tend(time.monotonic())
        time.sleep(0.05)


def test_replies_find_their_threads(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    link = links(cluster.start("a", [0, 1, 2, 3]).address)

    def ask(number: int) -> bool:
        link.send(frame(number, rows=1 + number % 5, expert=number % 4))
        output_TH = link.receive(number, 20).output_TH
        return output_TH.shape == (1 + number % 5, HIDDEN) and bool((output_TH == number % 4 + 1).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(1, 400)))
    assert link.idle


def test_replies_may_be_taken_in_any_order(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    link = links(cluster.start("a", [0]).address)
    for number in range(1, 40):
        link.send(frame(number))
    assert [link.receive(number, 20).frame_id for number in range(39, 0, -1)] == list(range(39, 0, -1))


def test_frames_larger_than_all_buffers_never_block_each_other(
    cluster: Cluster, links: Callable[..., WorkerLink]
) -> None:
    """16 frames of 6 MiB each way, all sent before the first is read."""
    link = links(cluster.start("a", [0]).address)
    for number in range(1, 17):
        link.send(frame(number, rows=49_152))
    for number in range(1, 17):
        assert link.receive(number, 60).output_TH.shape == (49_152, HIDDEN)


def test_a_large_reply_is_there_when_its_sender_comes_back(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    link = links(cluster.start("a", [0]).address)
    link.send(frame(1))
    link.receive(1, 20)
    link.send(frame(2, rows=49_152))
    until = time.monotonic() + 20
    while 2 not in link._replies:  # nobody receives: the poller files it
        assert time.monotonic() < until
        time.sleep(0.01)
    assert link.receive(2, 0.001).output_TH.shape == (49_152, HIDDEN)


def test_an_idle_link_stays_alive(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    """Both sides ping every second and want an answer within one."""
    link = links(cluster.start("a", [0]).address)
    link.send(frame(1))
    link.receive(1, 20)
    tended(link, 5)
    link.send(frame(2))
    assert link.receive(2, 5).frame_id == 2


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_an_idle_link_notices_a_peer_that_went_away(
    cluster: Cluster, links: Callable[..., WorkerLink], fault: signal.Signals
) -> None:
    link = links(cluster.start("a", [0]).address)
    link.send(frame(1))
    link.receive(1, 20)
    os.kill(cluster.processes["a"].pid, fault)
    tended(link, 4)
    link.send(frame(2))
    began = time.monotonic()
    with pytest.raises(WorkerLost, match=r"127\.0\.0\.1:\d+: UNAVAILABLE"):
        link.receive(2, 20)
    assert time.monotonic() - began < 0.5
    os.kill(cluster.processes["a"].pid, signal.SIGCONT)


def test_a_frozen_peer_ends_a_wait_by_its_missing_pings(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    link = links(cluster.start("a", [0]).address)
    link.send(frame(1))
    link.receive(1, 20)
    os.kill(cluster.processes["a"].pid, signal.SIGSTOP)
    link.send(frame(2))
    with pytest.raises(WorkerLost, match="UNAVAILABLE"):
        link.receive(2, 20)
    os.kill(cluster.processes["a"].pid, signal.SIGCONT)


def test_a_reply_that_does_not_come_in_time(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    link = links(cluster.start("a", [0], delay_s=2.0).address)
    stop = threading.Event()

    def watchdog() -> None:
        while not stop.wait(0.05):
            link.tend(time.monotonic())

    thread = threading.Thread(target=watchdog)
    thread.start()
    link.send(frame(1))
    with pytest.raises(WorkerSilent, match="did not answer in time"):
        link.receive(1, 0.3)
    link.send(frame(2))  # the stream is well, and the late reply is nobody's
    assert link.receive(2, 20).frame_id == 2
    assert link.idle
    assert not link._replies
    stop.set()
    thread.join()


def test_close_ends_the_wait_of_others(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    link = links(cluster.start("a", [0], delay_s=30.0).address)
    for number in (1, 2):
        link.send(frame(number))
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(link.receive, number, 60) for number in (1, 2)]
        while link._waiting < 2:
            time.sleep(0.01)
        link.close()
        for one in waiting:
            assert isinstance(one.exception(10), WorkerLost)
    link.close()  # again: nothing
    link.tend(time.monotonic())


def test_a_forgotten_frame_leaves_nothing_behind(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    link = links(cluster.start("a", [0]).address)
    for number in range(1, 50):
        link.send(frame(number))
        link.forget(number)
    link.send(frame(50))
    link.receive(50, 20)
    assert link.idle
    assert not link._replies


def test_a_worker_of_another_model_and_its_errors(cluster: Cluster, links: Callable[..., WorkerLink]) -> None:
    address = cluster.start("a", [0]).address
    link = links(address)
    link.send(frame(1, expert=5))
    link.send(frame(2, layer=91))
    link.send(frame(3))
    with pytest.raises(StalePlacement):
        link.receive(1, 20)
    with pytest.raises(FrameError, match="unknown layer 91"):
        link.receive(2, 20)
    assert link.receive(3, 20).frame_id == 3
    other = links(address, "another")
    other.send(frame(1))
    with pytest.raises(WorkerUnusable, match="refused the stream: this worker serves model test-model, the caller an"):
        other.receive(1, 20)


def test_nobody_listens(links: Callable[..., WorkerLink]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        link = links(f"127.0.0.1:{free.getsockname()[1]}")
        began = time.monotonic()
        link.send(frame(1))
        with pytest.raises(WorkerLost, match="UNAVAILABLE"):
            link.receive(1, 20)
    assert time.monotonic() - began < 3


def test_a_peer_that_speaks_something_else(links: Callable[..., WorkerLink]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        link = links(f"127.0.0.1:{listener.getsockname()[1]}")
        link.send(frame(1))
        peer, _ = listener.accept()
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
        peer.close()
        with pytest.raises(WorkerLost, match="UNAVAILABLE"):
            link.receive(1, 20)


def test_a_grpcio_without_what_is_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_stream, "_NEEDED", {frame_stream.cygrpc: ("NoSuchThing",)})
    with pytest.raises(StartupError, match=r"grpcio 1\.\S+ has no NoSuchThing in grpc\._cython\.cygrpc.*lock file"):
        frame_stream.probe()
