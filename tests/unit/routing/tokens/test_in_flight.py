"""Several dispatches in flight at once, over real gRPC to real processes, and ones that nobody finishes."""

from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cluster.errors import FrameError
from routing.tokens.client import ExpertClient
from tests.unit.routing.tokens.conftest import EXPERTS, HIDDEN, Cluster, rows

ALL = list(range(EXPERTS))


def links_idle(client: ExpertClient) -> bool:
    return all(link.idle for link in client._links._live.values())


def test_dispatches_finish_in_any_order(cluster: Cluster) -> None:
    cluster.start("a", ALL[:3])
    cluster.start("b", ALL[3:])
    cluster.publish("a", "b")
    client = cluster.client()
    begun = [(client.begin(1 + at % 2, *rows(4, seed=at)[:3]), rows(4, seed=at)[3]) for at in range(6)]
    for at in (3, 0, 5, 1, 4, 2):
        dispatch, expected = begun[at]
        torch.testing.assert_close(client.finish(dispatch), expected)
    assert links_idle(client)


def test_threads_share_links(cluster: Cluster) -> None:
    cluster.start("a", ALL[:3])
    cluster.start("b", ALL[3:])
    cluster.publish("a", "b")
    client = cluster.client()

    def dispatch(seed: int) -> None:
        hidden, ids, weights, expected = rows(1 + seed % 5, seed)
        torch.testing.assert_close(client.forward(1, hidden, ids, weights), expected)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(dispatch, range(200)))
    assert links_idle(client)


def test_two_threads_do_not_wait_for_each_others_meanwhile(cluster: Cluster) -> None:
    cluster.start("a", ALL)
    cluster.publish("a")
    client = cluster.client()
    hidden, ids, weights, expected = rows(2)
    inside, done = threading.Event(), threading.Event()

    def meanwhile() -> None:
        inside.set()
        assert done.wait(20)

    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(client.forward, 1, hidden, ids, weights, meanwhile)
        assert inside.wait(20)
        torch.testing.assert_close(client.forward(1, hidden, ids, weights), expected)
        done.set()
        torch.testing.assert_close(slow.result(20), expected)


def test_a_worker_killed_under_several_dispatches_loses_no_row(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.start("a", ALL, delay_s=5.0)
    cluster.start("b", ALL)
    cluster.publish("a", "b")
    client = cluster.client()
    begun = [(client.begin(1, *rows(8, seed=at)[:3]), rows(8, seed=at)[3]) for at in range(3)]
    cluster.processes["a"].kill()
    for dispatch, expected in begun:
        torch.testing.assert_close(client.finish(dispatch), expected)
    assert len([r for r in caplog.records if "its rows go elsewhere" in r.message]) == 1


@pytest.mark.parametrize("how", ["dropped", "given up", "failed"])
def test_a_dispatch_that_nobody_finishes_leaves_nothing(cluster: Cluster, how: str) -> None:
    cluster.start("a", ALL)
    cluster.publish("a")
    client = cluster.client()
    hidden, ids, weights, expected = rows(3)
    for _ in range(5):
        if how == "dropped":
            client.begin(1, hidden, ids, weights)
        elif how == "given up":
            client.abandon(client.begin(1, hidden, ids, weights))
        else:
            with pytest.raises(ZeroDivisionError):
                client.forward(1, hidden, ids, weights, meanwhile=lambda: 1 // 0)
    gc.collect()
    deadline = time.monotonic() + 10
    while not links_idle(client) and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert links_idle(client)
    link = client._links._live["a"]
    torch.testing.assert_close(client.forward(1, hidden, ids, weights), expected)
    assert client._links._live["a"] is link  # it went on; nobody else's dispatch was cut off
    assert not link._replies


@pytest.mark.parametrize("sent", [torch.float32, torch.bfloat16])
def test_the_caller_chooses_the_dtype(cluster: Cluster, sent: torch.dtype) -> None:
    cluster.start("a", ALL)
    cluster.publish("a")
    client = cluster.client()
    hidden, ids, weights, _ = rows(3)
    hidden = hidden.to(sent)
    assert client.forward(1, hidden, ids, weights).dtype == sent
    assert client.forward(1, hidden, ids, weights, dtype=torch.float16).dtype == torch.float16


def test_rows_in_fp8(cluster: Cluster) -> None:
    cluster.start("a", ALL[:3])
    cluster.start("b", ALL[3:])
    cluster.publish("a", "b")
    client = cluster.client(dispatch_dtype="float8_e4m3fn")
    hidden, ids, weights, expected = rows(9)
    got = client.forward(1, hidden, ids, weights)
    assert not torch.equal(got, expected)
    bound = torch.maximum(hidden.abs() / 16, hidden.abs().amax(1, keepdim=True) / 2**17)
    scale = ((ids + 1) * weights).sum(1, keepdim=True)
    assert ((got - expected).abs() <= bound * scale * 1.001).all()


def test_padding_rows_and_empty_batches_are_nought(cluster: Cluster) -> None:
    cluster.start("a", ALL[:3])
    cluster.start("b", ALL[3:])
    cluster.publish("a", "b")
    client = cluster.client()
    hidden, ids, weights, expected = rows(4)
    ids[2], expected[2] = -1, 0.0
    torch.testing.assert_close(client.forward(1, hidden, ids, weights), expected)
    assert client.forward(1, hidden[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("expert", [-2, EXPERTS, 2**15])
def test_an_expert_that_the_model_lacks_is_refused(cluster: Cluster, expert: int) -> None:
    cluster.start("a", ALL)
    cluster.publish("a")
    hidden, ids, weights, _ = rows(2)
    ids[1, 1] = expert
    with pytest.raises(FrameError, match="not one of -1 to 7"):
        cluster.client().begin(1, hidden, ids, weights)


def test_a_new_table_is_connected_before_it_is_used(cluster: Cluster) -> None:
    cluster.start("a", ALL)
    cluster.start("b", ALL)
    cluster.publish("a")
    client = cluster.client()
    hidden, ids, weights, expected = rows(2)
    client.forward(1, hidden, ids, weights)
    cluster.publish("b")
    deadline = time.monotonic() + 10
    while client._placement.current().table.stamp.n != 2 and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    assert set(client._links._live) == {"b"}  # no dispatch ran meanwhile
    cluster.processes["a"].kill()
    torch.testing.assert_close(client.forward(1, hidden, ids, weights), expected)


def test_a_worker_that_left_the_table_may_finish_what_it_has(cluster: Cluster) -> None:
    cluster.start("a", ALL, delay_s=1.0)
    cluster.start("b", ALL)
    cluster.publish("a")
    client = cluster.client()
    hidden, ids, weights, expected = rows(2)
    dispatch = client.begin(1, hidden, ids, weights)
    cluster.publish("b")
    client._placement.refresh()
    torch.testing.assert_close(client.finish(dispatch), expected)
    assert not dispatch.stopwatch.sample.retries


def test_a_stale_entry_costs_no_connection(cluster: Cluster) -> None:
    cluster.start("a", ALL[:2])
    cluster.endpoints["a"].experts[1] = tuple(ALL)  # type: ignore[index]  # the table is out of date
    cluster.start("b", ALL)
    cluster.publish("a", "b")
    client = cluster.client()
    hidden, ids, weights, expected = rows(8)
    client._placement.current()
    link = client._links._live["a"]
    torch.testing.assert_close(client.forward(1, hidden, ids, weights), expected)
    assert client._links._live["a"] is link
