"""Dispatch over real gRPC to real processes, with real faults."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from cluster.errors import DispatchTimeout, FrameError, UncoveredExperts
from routing.tokens.client import ExpertClient
from routing.tokens.request_ids import STEP_REQUEST_IDS
from tests.unit.routing.tokens.conftest import EXPERTS, Cluster, rows

ALL = list(range(8))


def dispatch(client: ExpertClient, count: int, layer: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, ids, weights, expected = rows(count, seed)
    return client.forward(layer, hidden, ids, weights), expected


@pytest.mark.parametrize("shares", [[ALL], [ALL[:3], ALL[3:]], [[0], [1, 2, 3, 4, 5], [6, 7]]])
@pytest.mark.parametrize("count", [1, 17])
def test_any_division_gives_the_same_sum(cluster: Cluster, shares: list[list[int]], count: int) -> None:
    for index, held in enumerate(shares):
        cluster.start(f"w{index}", held)
    cluster.publish(*cluster.endpoints)
    got, expected = dispatch(cluster.client(), count)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shares", [[ALL], [ALL[:1], ALL[1:]]])
def test_batches_over_the_message_bound_travel_in_pieces(cluster: Cluster, shares: list[list[int]]) -> None:
    for index, held in enumerate(shares):
        cluster.start(f"w{index}", held)
    cluster.publish(*cluster.endpoints)
    client = cluster.client(max_message_mib=1)
    got, expected = dispatch(client, 20_000)  # 20,000 rows x (128 + 18) bytes: three frames
    torch.testing.assert_close(got, expected)


def test_killed_worker_between_dispatches_goes_unnoticed(cluster: Cluster) -> None:
    cluster.start("a", ALL)
    cluster.start("b", ALL)
    cluster.publish("a", "b")
    client = cluster.client()
    dispatch(client, 8)
    cluster.processes["a"].kill()
    started = time.monotonic()
    got, expected = dispatch(client, 8, seed=1)
    torch.testing.assert_close(got, expected)
    assert time.monotonic() - started < 5.0  # call_timeout_s is 30: the loss was seen, not waited for


def test_worker_killed_while_it_computes_loses_no_row(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    step = STEP_REQUEST_IDS.set("cmpl-a,cmpl-b")
    cluster.start("a", ALL, delay_s=5.0)
    cluster.start("b", ALL)
    cluster.publish("a", "b")
    client = cluster.client()
    threading.Timer(0.5, cluster.processes["a"].kill).start()
    started = time.monotonic()
    got, expected = dispatch(client, 8)
    torch.testing.assert_close(got, expected)
    assert time.monotonic() - started < 4.5
    lost = [r.fields for r in caplog.records if "its rows go elsewhere" in r.message]  # type: ignore[attr-defined]
    assert lost == [{"worker_id": "a", "request_id": "cmpl-a,cmpl-b"}]
    STEP_REQUEST_IDS.reset(step)


def test_hung_worker_is_found_by_keepalive(cluster: Cluster) -> None:
    cluster.start("a", ALL)
    cluster.start("b", ALL)
    cluster.publish("a", "b")
    client = cluster.client()
    dispatch(client, 8)
    cluster.processes["a"].send_signal(signal.SIGSTOP)
    started = time.monotonic()
    got, expected = dispatch(client, 8, seed=2)
    torch.testing.assert_close(got, expected)
    assert time.monotonic() - started < 10.0
    cluster.processes["a"].send_signal(signal.SIGCONT)


def test_slow_worker_misses_the_call_deadline(cluster: Cluster) -> None:
    cluster.start("a", ALL, delay_s=30.0)
    cluster.start("b", ALL)
    cluster.publish("a", "b")
    got, expected = dispatch(cluster.client(call_timeout_s=0.5), 8)
    torch.testing.assert_close(got, expected)


def test_waits_for_a_new_worker_when_none_holds_an_expert(cluster: Cluster) -> None:
    cluster.start("a", ALL[:4])
    cluster.start("b", ALL[4:])
    cluster.publish("a", "b")
    client = cluster.client()
    dispatch(client, 4)
    cluster.processes["b"].kill()
    cluster.start("c", ALL[4:])
    threading.Timer(1.0, cluster.publish, ("a", "c")).start()
    got, expected = dispatch(client, 4, seed=3)
    torch.testing.assert_close(got, expected)


def test_uncovered_fails_by_name_of_the_expert(cluster: Cluster) -> None:
    cluster.start("a", ALL[:4])
    cluster.publish("a")
    with pytest.raises(UncoveredExperts, match=r"layer 1: no live expert worker holds expert\(s\).*after dispatch"):
        dispatch(cluster.client(uncovered_timeout_s=0.2), 8)
    with pytest.raises(UncoveredExperts, match="replicas_per_expert"):
        dispatch(cluster.client(on_uncovered="fail"), 8)


def test_degraded_rows_keep_their_weight_without_the_lost_experts(cluster: Cluster) -> None:
    cluster.start("a", ALL[:6])
    cluster.publish("a")
    hidden, ids, weights, _ = rows(16)
    ids[0], ids[1] = torch.tensor([0, 6, 7]), torch.tensor([0, 1, 2])
    got = cluster.client(on_uncovered="degrade", uncovered_timeout_s=0.2).forward(1, hidden, ids, weights)
    kept = torch.where(ids < 6, weights, 0.0)
    scaled = kept * (weights.sum(1) / kept.sum(1)).unsqueeze(1)
    torch.testing.assert_close(got, hidden * ((ids + 1) * scaled).sum(1, keepdim=True))
    assert not torch.equal(scaled[0], weights[0])
    torch.testing.assert_close(scaled[1], weights[1])


def test_a_row_with_no_expert_left_is_never_a_silent_zero(cluster: Cluster) -> None:
    cluster.start("a", ALL[:4])
    cluster.publish("a")
    hidden, ids, weights, _ = rows(2)
    ids[0], ids[1] = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])
    with pytest.raises(UncoveredExperts):
        cluster.client(on_uncovered="degrade", uncovered_timeout_s=0.2).forward(1, hidden, ids, weights)


def test_a_failed_dispatch_leaves_the_client_usable(cluster: Cluster) -> None:
    cluster.start("a", ALL)
    cluster.publish("a")
    client = cluster.client()
    with pytest.raises(FrameError, match="unknown layer 99"):
        dispatch(client, 4, layer=99)
    got, expected = dispatch(client, 4)
    torch.testing.assert_close(got, expected)


def test_another_model_is_refused(cluster: Cluster) -> None:
    cluster.start("a", ALL, model="other")
    cluster.publish("a")
    with pytest.raises(UncoveredExperts, match=r"set aside: .* one cluster, one checkpoint"):
        dispatch(cluster.client(uncovered_timeout_s=0.5), 1)


def test_total_deadline_bounds_the_retry_loop(cluster: Cluster) -> None:
    cluster.start("a", ALL, delay_s=30.0)
    cluster.publish("a")
    with pytest.raises((DispatchTimeout, UncoveredExperts)):
        dispatch(cluster.client(call_timeout_s=0.3, dispatch_timeout_s=1.0, uncovered_timeout_s=1.0), 2)


def test_worker_that_no_longer_holds_an_expert_is_passed_over(cluster: Cluster) -> None:
    cluster.start("a", ALL[:2])
    cluster.endpoints["a"].experts[1] = tuple(ALL)  # type: ignore[index]  # the table is out of date
    cluster.start("b", ALL)
    cluster.publish("a", "b")
    got, expected = dispatch(cluster.client(), 8)
    torch.testing.assert_close(got, expected)


def test_rows_of_a_shared_expert_go_where_they_are_answered_sooner(cluster: Cluster) -> None:
    everything = list(range(EXPERTS))
    cluster.start("quick", everything)
    cluster.start("slow", everything, delay_s=0.02)
    cluster.publish("quick", "slow")
    client, (hidden, ids, weights, expected) = cluster.client(), rows(40)
    deadline, parts = time.monotonic() + 30, {0: 1, 1: 1}
    while parts[1] * 3 > parts[0] and time.monotonic() < deadline:
        torch.testing.assert_close(client.forward(1, hidden, ids, weights), expected)
        route_EQ = client._placement.current().routes.layer(1)[:-1]
        parts = {worker: int((route_EQ == worker).sum()) for worker in parts}
    assert parts[1] * 3 <= parts[0]
    assert parts[1] > 0  # still asked, or nobody would hear that it is well again
