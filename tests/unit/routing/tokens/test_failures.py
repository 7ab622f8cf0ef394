"""Each kind of failure by its own name: what becomes of the rows, the worker and its link, and that nothing hangs."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cluster.errors import DispatchTimeout, FrameError, UncoveredExperts, WorkerBusy, WorkerFailing
from routing.tokens.client import ExpertClient
from routing.tokens.wire import ErrorReply, decode_reply
from tests.unit.routing.tokens.conftest import rows
from tests.unit.routing.tokens.expert_calls import eventually
from tests.unit.routing.tokens.local_plane import ALL, Experts, LocalPlane, Raises, forward, local_plane


@pytest.fixture
def plane(tmp_path: Path) -> Iterator[LocalPlane]:
    with local_plane(tmp_path) as made:
        yield made


@pytest.fixture
def silence() -> Iterator[threading.Event]:
    """What silent experts wait for; it ends with the test."""
    over = threading.Event()
    yield over
    over.set()


def live_links(client: ExpertClient) -> dict[str, object]:
    return dict(client._links._live)


def lines(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.fields["worker_id"] for record in caplog.records if text in record.message]  # type: ignore[attr-defined]


# --- deadlines ---


def test_several_silent_workers_cost_one_call_timeout(plane: LocalPlane, silence: threading.Event) -> None:
    for at in range(4):
        plane.start(f"w{at}", Experts(before=lambda: silence.wait(30) and None), held=(2 * at, 2 * at + 1))
    plane.publish()
    client = plane.client(call_timeout_s=1.0, uncovered_timeout_s=0)
    started = time.monotonic()
    with pytest.raises(UncoveredExperts):
        forward(client)
    assert 0.9 < time.monotonic() - started < 2.5  # one after the other they would cost 4 s
    assert plane.value(client, "workers_lost_total", reason="worker_silent") == 4


def test_a_reply_that_came_while_the_caller_was_away_counts(plane: LocalPlane) -> None:
    plane.start("a", Experts(ALL[:4]), ALL[:4])
    plane.start("b", Experts(ALL[4:]), ALL[4:])
    plane.publish()
    client = plane.client(call_timeout_s=0.2)
    hidden, ids, weights, expected = rows(8)
    got = client.forward(1, hidden, ids, weights, meanwhile=lambda: time.sleep(0.6))
    torch.testing.assert_close(got, expected)
    assert plane.value(client, "workers_lost_total", reason="worker_silent") == 0


def test_the_end_of_a_dispatch_is_not_its_workers_fault(plane: LocalPlane, silence: threading.Event) -> None:
    full = Raises(WorkerBusy("full"))

    def before() -> None:
        full()
        silence.wait(2)

    plane.start("a", Experts(before=before))
    plane.publish()
    client = plane.client(call_timeout_s=0.9, dispatch_timeout_s=1.0, uncovered_timeout_s=1.0)
    client._placement.current()
    links = live_links(client)
    with pytest.raises(DispatchTimeout, match=r"dispatch\.dispatch_timeout_s passed; last: .* did not answer in time"):
        forward(client)
    assert live_links(client) == links
    assert client._faults.conditions.lost_at == {}


def test_the_wait_for_a_holder_begins_when_there_is_none(plane: LocalPlane, silence: threading.Event) -> None:
    plane.start("a", Experts(before=lambda: silence.wait(30) and None))
    plane.publish()
    client = plane.client(call_timeout_s=1.0, uncovered_timeout_s=0.8, lost_worker_pause_s=30, reconnect_interval_s=30)
    started = time.monotonic()
    with pytest.raises(UncoveredExperts, match=r"after dispatch\.uncovered_timeout_s.*last lost: .*not answer in time"):
        forward(client)
    assert 1.8 <= time.monotonic() - started < 4


def test_the_wait_for_a_holder_ends_with_the_dispatch(plane: LocalPlane) -> None:
    plane.publish()
    client = plane.client(call_timeout_s=0.4, uncovered_timeout_s=0.5, dispatch_timeout_s=0.5)
    started = time.monotonic()
    with pytest.raises(UncoveredExperts, match=r"after dispatch\.dispatch_timeout_s"):
        forward(client)
    assert time.monotonic() - started < 2


# --- set aside ---


def test_a_worker_of_another_model_stops_nobody(plane: LocalPlane, caplog: pytest.LogCaptureFixture) -> None:
    bad = Experts()
    plane.start("bad", bad, model="another")
    plane.start("good", Experts())
    plane.publish()
    client = plane.client()
    for seed in range(3):
        forward(client, seed=seed)
    assert bad.asked == []
    assert lines(caplog, "set aside") == ["bad"]
    assert plane.value(client, "workers_set_aside", reason="worker_unusable") == 1
    plane.publish("good")
    client._placement.refresh()
    assert plane.value(client, "workers_set_aside", reason="worker_unusable") == 0


def test_a_worker_of_another_model_is_found_before_it_gets_rows(plane: LocalPlane) -> None:
    plane.start("bad", Experts(), model="another")
    plane.start("good", Experts())
    plane.publish()
    client = plane.client()
    client._placement.current()
    eventually(lambda: client._faults.conditions.aside == {"bad": "worker_unusable"})
    forward(client)
    assert plane.value(client, "retries_total", reason="worker_unusable") == 0


def test_alone_it_is_no_holder(plane: LocalPlane) -> None:
    plane.start("bad", Experts(), model="another")
    plane.publish()
    with pytest.raises(UncoveredExperts, match=r"set aside: .*this worker serves model another, the caller test"):
        forward(plane.client(uncovered_timeout_s=0.3))


@pytest.mark.parametrize("answer", [b"DSX9" + bytes(36), b"", b"garbage" * 10])
def test_a_worker_of_another_wire_version_stops_nobody(
    plane: LocalPlane, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    plane.start_stranger("bad", answer)
    plane.start("good", Experts())
    plane.publish()
    client = plane.client()
    for seed in range(3):
        forward(client, seed=seed)
    assert lines(caplog, "set aside") == ["bad"]


def test_a_worker_that_refuses_what_others_take_is_set_aside(
    plane: LocalPlane, caplog: pytest.LogCaptureFixture
) -> None:
    older = Experts(before=Raises(*[FrameError("unknown dtype code 3") for _ in range(9)]))
    plane.start("older", older)
    plane.start("good", Experts())
    plane.publish()
    client = plane.client()
    links = live_links(client)
    for seed in range(3):
        forward(client, seed=seed)
    assert len(older.asked) == 1
    assert lines(caplog, "it refuses what other workers take: unknown dtype code 3") == ["older"]
    assert links.items() <= live_links(client).items()


def test_rows_that_every_holder_refuses_end_at_once(plane: LocalPlane) -> None:
    for name in ("a", "b", "c"):
        plane.start(name, Experts(before=Raises(FrameError("no such shape"))))
    plane.publish()
    client = plane.client()
    started = time.monotonic()
    with pytest.raises(FrameError, match="every holder of some experts refused the rows, the last: no such shape"):
        forward(client)
    assert time.monotonic() - started < 5
    assert client._faults.conditions.aside == {}  # the frame was at fault
    forward(client)


# --- stale ---


def test_a_stale_entry_is_out_until_the_next_table(plane: LocalPlane) -> None:
    poor, rich = Experts(ALL[:3]), Experts()
    plane.start("poor", poor)  # the table says that it holds all
    plane.start("rich", rich)
    plane.publish()
    client = plane.client()
    client._placement.current()
    links = live_links(client)
    for seed in range(30):  # each begins with other holders: all of poor's entries are found out
        forward(client, seed=seed)
    assert poor.asked[0] - poor.held
    before, retries = len(poor.asked), plane.value(client, "retries_total", reason="stale_placement")
    assert retries <= len(ALL) - len(poor.held)  # never the same entry twice
    for seed in range(30):
        forward(client, seed=seed)
    assert poor.asked[before:] != []
    assert all(asked <= poor.held for asked in poor.asked[before:])  # the rest of what it holds is still asked there
    assert plane.value(client, "retries_total", reason="stale_placement") == retries
    assert live_links(client) == links
    poor.held = set(ALL)
    plane.publish()
    client._placement.refresh()
    for seed in range(30):
        forward(client, seed=seed)
    assert set().union(*poor.asked[-20:]) - set(ALL[:3])


def test_a_stale_entry_without_another_holder_ends_by_name(plane: LocalPlane) -> None:
    plane.start("poor", Experts(ALL[:7]))
    plane.publish()
    with pytest.raises(UncoveredExperts, match=r"holds expert\(s\) 7 after .*; last refused: not held here: \{7\}"):
        forward(plane.client(uncovered_timeout_s=0.3))


def test_a_new_table_ends_the_wait_for_a_stale_entry(plane: LocalPlane) -> None:
    poor = Experts(ALL[:7])
    plane.start("poor", poor)
    plane.publish()

    def mend() -> None:
        poor.held = set(ALL)
        plane.publish()

    threading.Timer(0.4, mend).start()
    forward(plane.client())


# --- late ---


def both_known(plane: LocalPlane, frozen: threading.Event, **settings: object) -> ExpertClient:
    """A client that knows how long its two workers take; `slow` then waits for the event, 0.01 s before."""
    waits = [0.0]
    plane.start("slow", Experts(before=lambda: time.sleep(0.01) if not waits[0] else void(frozen.wait(waits[0]))))
    plane.start("quick", Experts())
    plane.publish()
    client = plane.client(**settings)
    for seed in range(30):
        forward(client, seed=seed)
    waits[0] = 20.0
    return client


def void(_: object) -> None:
    """What came of it does not matter."""


def test_rows_of_a_late_worker_go_to_another_holder_too(plane: LocalPlane, silence: threading.Event) -> None:
    client = both_known(plane, silence)
    links, started = live_links(client), time.monotonic()
    for seed in range(20):
        forward(client, seed=seed)
    assert time.monotonic() - started < 3  # call_timeout_s is 8
    late = plane.value(client, "retries_total", reason="worker_late")
    assert 1 <= late <= 3  # it is asked again once a second
    assert plane.value(client, "workers_lost_total", reason="worker_silent") == 0
    assert live_links(client) == links
    silence.set()
    eventually(lambda: time.monotonic() - started > 2)
    for seed in range(10):
        forward(client, seed=seed)
    assert client._faults.conditions.all_well


def test_a_late_worker_without_another_holder_is_waited_for(plane: LocalPlane, silence: threading.Event) -> None:
    client = both_known(plane, silence)
    plane.publish("slow")
    client._placement.refresh()
    threading.Timer(1.0, silence.set).start()
    started = time.monotonic()
    forward(client)
    assert 0.8 < time.monotonic() - started < 5
    assert plane.value(client, "retries_total", reason="worker_late") == 0
    assert client._faults.conditions.all_well


def test_hedging_can_be_turned_off(plane: LocalPlane, silence: threading.Event) -> None:
    client = both_known(plane, silence, hedge_after_s=1e9)
    threading.Timer(1.0, silence.set).start()
    for seed in range(4):
        forward(client, seed=seed)
    assert plane.value(client, "retries_total", reason="worker_late") == 0


# --- busy ---


def test_the_only_holder_is_asked_again_when_it_was_busy(plane: LocalPlane) -> None:
    busy = Experts(before=Raises(WorkerBusy("full", queue_s=2.0), WorkerBusy("full", queue_s=1.2)))
    plane.start("busy", busy)
    plane.publish()
    client = plane.client(on_uncovered="fail")  # it is not uncovered
    client._placement.current()
    links = live_links(client)
    started = time.monotonic()
    forward(client)
    assert 0.8 <= time.monotonic() - started < 5  # a quarter of what it said
    assert len(busy.asked) == 3
    assert live_links(client) == links
    assert client._faults.conditions.excluded(60, time.monotonic()) == frozenset()
    assert plane.value(client, "backoff_seconds_total") > 0.7
    assert plane.value(client, "uncovered_wait_seconds_total") == 0


def test_only_refused_rows_of_a_busy_worker_go_to_others(plane: LocalPlane) -> None:
    busy, other = Experts(before=Raises(WorkerBusy("full", queue_s=40.0))), Experts()
    plane.start("busy", busy)
    plane.start("other", other)
    plane.publish()
    client = plane.client()
    started = time.monotonic()
    forward(client)
    assert time.monotonic() - started < 2
    assert len(other.asked) == 2
    for seed in range(1, 4):
        forward(client, seed=seed)
    assert len(busy.asked) == 4  # it is asked as ever
    assert plane.value(client, "workers_lost_total", reason="worker_lost") == 0


def test_a_worker_that_stays_busy_ends_the_dispatch_in_time(plane: LocalPlane) -> None:
    plane.start("busy", Experts(before=Raises(*[WorkerBusy("full", queue_s=0.1) for _ in range(99)])))
    plane.publish()
    client = plane.client(call_timeout_s=0.9, dispatch_timeout_s=1.0, uncovered_timeout_s=1.0)
    started = time.monotonic()
    with pytest.raises(DispatchTimeout):
        forward(client)
    assert time.monotonic() - started < 3


def test_a_full_queue_says_so(plane: LocalPlane, silence: threading.Event) -> None:
    entered = threading.Event()

    def slow() -> None:
        entered.set()
        silence.wait(30)

    server = plane.start("slow", Experts(before=slow))
    plane.publish()
    client = plane.client(call_timeout_s=4.0)
    hidden, ids, weights, expected = rows(4)
    first = client.begin(1, hidden, ids, weights)
    assert entered.wait(10)
    second = client.begin(2, hidden, ids, weights)
    eventually(lambda: server.waiting() == 1)
    half_over = time.monotonic() + 2.1
    eventually(lambda: time.monotonic() > half_over)
    third = client.begin(2, hidden, ids, weights)
    (sent,) = third.sent
    with pytest.raises(WorkerBusy, match="too long for this one") as caught:
        sent.link.receive(sent.frames[0][0], 1.0)
    assert 2.0 < caught.value.queue_s < 4.0
    silence.set()
    for dispatch in (first, second):
        torch.testing.assert_close(client.finish(dispatch), expected)
    client.abandon(third)


# --- failing ---


def test_rows_go_elsewhere_when_a_kernel_fails_and_the_link_stays(plane: LocalPlane) -> None:
    failing = Experts(before=Raises(ZeroDivisionError("kernel")))
    plane.start("failing", failing)
    plane.start("other", Experts())
    plane.publish()
    client = plane.client()
    client._placement.current()
    links = live_links(client)
    for seed in range(3):
        forward(client, seed=seed)
    assert len(failing.asked) == 3
    assert plane.value(client, "retries_total", reason="worker_failing") == 1
    assert live_links(client) == links
    assert plane.servers["failing"].failure() is None


def test_the_only_holder_is_asked_again_when_its_kernel_failed(plane: LocalPlane) -> None:
    plane.start("failing", Experts(before=Raises(MemoryError(), MemoryError())))
    plane.publish()
    client = plane.client(on_uncovered="fail")
    forward(client)
    assert plane.servers["failing"].failure() is None


def test_a_worker_that_fences_itself_is_replaced_under_a_dispatch(
    plane: LocalPlane, caplog: pytest.LogCaptureFixture
) -> None:
    broken = plane.start("broken", Experts(before=Raises(*[RuntimeError("kernel") for _ in range(99)])))
    plane.start("new", Experts())
    plane.publish("broken")
    client = plane.client()
    threading.Timer(1.5, plane.publish, ("new",)).start()
    forward(client)
    assert "3 turns of the experts in a row failed" in (broken.failure() or "")
    assert lines(caplog, "set aside") == ["broken"]
    assert plane.value(client, "retries_total", reason="worker_failing") == 4  # three kernels and the fence


def test_a_fenced_worker_is_set_aside_where_others_are(plane: LocalPlane) -> None:
    broken = Experts(before=Raises(*[RuntimeError("kernel") for _ in range(99)]))
    plane.start("broken", broken)
    plane.start("good", Experts())
    plane.publish()
    client = plane.client()
    for seed in range(8):
        forward(client, seed=seed)
    assert len(broken.asked) == 3
    assert plane.value(client, "workers_set_aside", reason="worker_failing") == 1


def test_rows_that_every_kernel_fails_on_do_not_fence_the_plane(plane: LocalPlane) -> None:
    for name in ("a", "b", "c"):
        plane.start(name, Experts(before=Raises(*[RuntimeError("poison") for _ in range(99)])))
    plane.publish()
    client = plane.client()
    with pytest.raises(WorkerFailing, match="poison"):
        forward(client)
    assert [name for name, server in plane.servers.items() if server.failure() is not None] == []


def test_a_hung_turn_fences_and_refuses_at_once(plane: LocalPlane, silence: threading.Event) -> None:
    entered = threading.Event()

    def hang() -> None:
        entered.set()
        silence.wait(30)

    hung = plane.start("hung", Experts(before=hang), call_timeout_s=1.0)
    plane.publish()
    client = plane.client(call_timeout_s=15.0, uncovered_timeout_s=0)
    hidden, ids, weights, _ = rows(4)
    first = client.begin(1, hidden, ids, weights)
    assert entered.wait(10)
    waits = client.begin(2, hidden, ids, weights)
    eventually(lambda: hung.waiting() == 1)
    eventually(lambda: hung.failure() is not None)
    assert hung.waiting() == 0
    later = client.begin(2, hidden, ids, weights)
    for refused in (waits, later):
        (sent,) = refused.sent
        with pytest.raises(WorkerFailing, match=r"more than dispatch\.call_timeout_s \(1 s\)") as caught:
            sent.link.receive(sent.frames[0][0], 5)
        assert caught.value.fenced
    for dispatch in (first, waits, later):
        client.abandon(dispatch)


# --- lost ---


def test_a_loss_on_an_idle_link_is_reported_by_whoever_looks_first(
    plane: LocalPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.start("a", Experts())
    plane.start("b", Experts())
    plane.publish()
    client = plane.client()
    forward(client)
    plane.servers["a"].stop(0)
    eventually(lambda: plane.value(client, "workers_lost_total", reason="worker_lost") == 1)
    assert lines(caplog, "lost") == ["a"]
    assert set(client._faults.conditions.lost_at) == {"a"}
    forward(client, seed=1)
    assert plane.value(client, "retries_total", reason="worker_lost") == 0


# --- workers of the version before ---


@pytest.mark.parametrize(("code", "kind"), [(1, FrameError), (3, WorkerBusy), (4, WorkerFailing), (77, WorkerFailing)])
def test_error_replies_of_other_versions_are_understood(code: int, kind: type[Exception]) -> None:
    frame = struct.pack("<4sBBBBQIIIIII", b"DSX1", 3, 0, 0, code, 5, 0, 0, 4, 0, 0, 0) + b"text"
    reply = decode_reply(frame)
    assert isinstance(reply, ErrorReply)
    assert type(reply.error) is kind
    assert str(reply.error) == "text"
    assert not getattr(reply.error, "fenced", False)
    assert getattr(reply.error, "queue_s", 0.0) == 0.0
