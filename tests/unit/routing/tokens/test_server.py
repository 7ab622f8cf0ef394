"""The expert server over real gRPC: whom it refuses, what it says of its work, and how it survives its clients."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref

import grpc
import pytest
import torch
from prometheus_client import CollectorRegistry

from cluster.config import DispatchConfig
from cluster.errors import FrameError, StartupError
from monitoring.expert_meter import ExpertMeter
from monitoring.metrics import ExpertMetrics
from routing.tokens import frame_server
from routing.tokens.frame_server import READ_AHEAD_FRAMES, FrameServer, Stream
from routing.tokens.server import ExpertServer
from routing.tokens.wire import DispatchReply, ErrorReply
from tests.unit.routing.tokens.expert_calls import HIDDEN, MODEL, WAIT_S, Gate, eventually, frame, serving, twice


def is_right(reply: DispatchReply | ErrorReply, frame_id: int, rows: int = 2) -> bool:
    assert isinstance(reply, DispatchReply)
    return reply.frame_id == frame_id and torch.equal(reply.output_TH, torch.full((rows, HIDDEN), 2.0 * frame_id))


def test_what_is_refused_late_or_fails_is_logged_with_its_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    def experts(layer: int, hidden_TH: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if layer == 9:
            raise FrameError("unknown layer 9")
        if layer == 8:
            raise ZeroDivisionError
        return hidden_TH

    with serving(experts) as (_, connect):
        stream = connect()
        for refused in (
            frame(request_ids="cmpl-a,cmpl-b")[:-40] + b"cmpl-a,cmpl-b",
            frame(layer=9, request_ids="cmpl-c"),
            frame(layer=8, request_ids="cmpl-d"),
            frame(request_ids="cmpl-e", deadline_ms=0),
        ):
            assert isinstance(stream.ask(refused), ErrorReply)
    said = [(r.levelname, r.fields["request_id"]) for r in caplog.records]  # type: ignore[attr-defined]
    assert said == [
        ("WARNING", "cmpl-a,cmpl-b"), ("WARNING", "cmpl-c"), ("ERROR", "cmpl-d"), ("WARNING", "cmpl-e")
    ]  # fmt: skip
    assert "truncated or corrupt" in caplog.messages[0]
    assert "unknown layer 9" in caplog.messages[1]
    assert caplog.records[2].exc_info is not None
    assert caplog.records[2].exc_info[0] is ZeroDivisionError
    assert "deadline passed" in caplog.messages[3]


def test_at_debug_level_each_batch_names_its_requests(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as (_, connect):
        stream = connect()
        assert isinstance(stream.ask(frame(layer=3, request_ids="cmpl-a,cmpl-b")), DispatchReply)
        assert caplog.records == []
        with caplog.at_level(logging.DEBUG, logger="routing.tokens.turn_runner"):
            stream.ask(frame(layer=3, request_ids="cmpl-a,cmpl-b"))
        (line,) = caplog.records
    assert line.fields["request_id"] == "cmpl-a,cmpl-b"  # type: ignore[attr-defined]
    assert (line.fields["layer"], line.fields["rows"]) == (3, 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "code", "details"),
    [
        ({"model": "other"}, grpc.StatusCode.FAILED_PRECONDITION,
         "this worker serves model model, the caller other: one cluster, one checkpoint"),
        ({"model": None}, grpc.StatusCode.FAILED_PRECONDITION, "the caller None"),
        ({"path": "/deepsplit.experts.v1.Experts/Else"}, grpc.StatusCode.UNIMPLEMENTED, "Method not found"),
    ],
)  # fmt: skip
def test_streams_that_are_not_for_us_are_refused(
    options: dict[str, str | None], code: grpc.StatusCode, details: str
) -> None:
    with serving() as (_, connect):
        refused = connect(**options)
        with pytest.raises(grpc.RpcError):
            refused.ask(frame())
        assert refused.call.code() is code
        assert details in refused.call.details()
        assert is_right(connect().ask(frame(3)), 3)


def test_a_stream_beyond_the_bound_is_refused_and_one_that_ends_makes_room() -> None:
    with serving(max_streams=64) as (_, connect):
        streams = [connect() for _ in range(64)]
        for number, stream in enumerate(streams):
            assert is_right(stream.ask(frame(number)), number)
        beyond = connect()
        with pytest.raises(grpc.RpcError):
            beyond.ask(frame())
        assert beyond.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "dispatch.max_streams" in beyond.call.details()
        assert is_right(streams[5].ask(frame(7)), 7)
        streams[0].close()

        def taken() -> bool:
            stream = connect()
            try:
                return is_right(stream.ask(frame(9)), 9)
            except grpc.RpcError:
                return False

        eventually(taken)


def test_a_port_in_use_is_an_error_that_names_the_setting() -> None:
    with serving() as (server, connect):
        address = connect().channel._channel.target().decode()
        second = ExpertServer(twice, HIDDEN, MODEL, DispatchConfig())
        with pytest.raises(StartupError, match=r"see experts\.host"):
            second.start("127.0.0.1", int(address.rpartition(":")[2]))
        second.stop(0)
        assert server.waiting() == 0


def test_frames_over_the_message_bound_end_their_stream_only() -> None:
    with serving(max_message_mib=1) as (_, connect):
        large, other = connect(max_message_mib=4), connect()
        with pytest.raises(grpc.RpcError):
            large.ask(frame(rows=100_000))
        assert large.call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert is_right(other.ask(frame(2)), 2)


def test_garbage_is_answered_with_an_error_and_the_stream_goes_on() -> None:
    whole = frame()
    garbage = [b"", b"\0", b"DSX1", whole[:-1], whole + b"\0", b"X" * 40, b"\xff" * 4096, whole[:4] + b"\xff" * 36,
               *(whole[:at] + b"\xff" + whole[at + 1 :] for at in range(40))]  # fmt: skip
    with serving() as (_, connect):
        stream = connect()
        for one in garbage:
            reply = stream.ask(one)
            # A changed id, epoch, layer or deadline is not garbage.
            assert isinstance(reply, ErrorReply) or torch.equal(reply.output_TH, torch.full((2, HIDDEN), 2.0))
        assert is_right(stream.ask(frame(3)), 3)


def test_a_half_closed_stream_gets_all_its_replies_and_a_good_end() -> None:
    with serving() as (_, connect):
        stream = connect()
        stream.send(*(frame(number) for number in range(5)))
        stream.half_close()
        assert sorted(stream.reply().frame_id for _ in range(5)) == list(range(5))
        with pytest.raises(StopIteration):
            next(stream.call)
        assert stream.call.code() is grpc.StatusCode.OK
        idle = connect()
        idle.half_close()
        with pytest.raises(StopIteration):
            next(idle.call)


def test_what_a_client_that_vanished_waits_for_is_not_computed() -> None:
    gate, metrics = Gate(), ExpertMetrics(CollectorRegistry())
    with serving(gate, ExpertMeter(metrics)) as (server, connect):
        stays, vanishes = connect(), connect()
        vanishes.send(frame(layer=1))
        assert gate.entered.wait(WAIT_S)
        vanishes.send(frame(layer=2), frame(layer=3))
        stays.send(frame(4, layer=4))
        eventually(lambda: server.waiting() == 3)
        vanishes.close()
        eventually(lambda: server.waiting() == 1)
        gate.open.set()
        assert is_right(stays.reply(), 4)
        assert gate.layers == [1, 4]
        assert metrics.streams._value.get() == 1
    eventually(lambda: metrics.streams._value.get() == 0)


def test_nothing_is_kept_of_streams_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Stream]] = []
    begin = Stream.begin
    monkeypatch.setattr(Stream, "begin", lambda self: (made.append(weakref.ref(self)), begin(self)))
    with serving() as (_, connect):
        for number in range(20):
            stream = connect()
            assert is_right(stream.ask(frame(number)), number)
            if number % 2:
                stream.half_close()
            else:
                stream.close()

        def none_left() -> bool:
            gc.collect()
            return len(made) == 20 and not any(ref() for ref in made)

        eventually(none_left)


def test_a_client_that_reads_nothing_is_read_no_further() -> None:
    gate = Gate()
    with serving(gate) as (server, connect):
        flood, other = connect(), connect()
        flood.send(*(frame(number, layer=number) for number in range(200)))
        eventually(lambda: server.waiting() == READ_AHEAD_FRAMES - 1)  # one is being computed
        other.send(frame(500, layer=500))
        eventually(lambda: server.waiting() == READ_AHEAD_FRAMES)
        gate.open.set()
        assert is_right(other.reply(), 500)
        assert [flood.reply().frame_id for _ in range(200)] == list(range(200))


def test_pings_are_answered_and_frames_read_while_a_kernel_runs() -> None:
    gate = Gate()
    with serving(gate, keepalive_interval_s=0.2, keepalive_timeout_s=0.4) as (server, connect):
        streams = [connect(keepalive_interval_s=0.2, keepalive_timeout_s=0.4) for _ in range(3)]
        for number in range(3):  # a short turn is expected, so the helper is not called at its start
            gate.open.set()
            assert is_right(streams[0].ask(frame(number)), number)
        gate.open.clear()
        gate.entered.clear()
        streams[0].send(frame(0))
        assert gate.entered.wait(WAIT_S)
        for number in (1, 2):
            streams[number].send(frame(number))
        eventually(lambda: server._threads.computing_s() > 2.0)  # five times what a ping may take
        assert server.waiting() == 2
        late = connect()
        late.send(frame(9))
        eventually(lambda: server.waiting() == 3)
        gate.open.set()
        for number, stream in enumerate([*streams, late]):
            assert is_right(stream.reply(), 9 if stream is late else number)
        eventually(lambda: server._threads.computing_s() == 0.0)


def test_stop_lets_running_requests_end_and_then_cuts() -> None:
    gate = Gate()
    with serving(gate) as (server, connect):
        stream = connect()
        stream.send(frame(1))
        assert gate.entered.wait(WAIT_S)
        stopping = threading.Thread(target=server.stop, args=(1.0,))
        stopping.start()

        def refused() -> bool:
            try:
                connect().ask(frame())
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        eventually(refused)
        gate.open.set()
        assert is_right(stream.reply(), 1)
        with pytest.raises(grpc.RpcError):
            stream.reply()
        stopping.join(WAIT_S)
        assert not stopping.is_alive()


def test_stop_ends_at_once_when_the_last_stream_does() -> None:
    with serving() as (server, connect):
        stream = connect()
        assert is_right(stream.ask(frame(1)), 1)
        stopping = threading.Thread(target=server.stop, args=(WAIT_S,))
        started = time.monotonic()
        stopping.start()
        stream.half_close()
        stopping.join(WAIT_S)
        assert time.monotonic() - started < WAIT_S / 2


def test_stop_does_not_wait_for_a_kernel_that_hangs() -> None:
    gate = Gate()
    with serving(gate) as (server, connect):
        stream = connect()
        stream.send(frame(1))
        assert gate.entered.wait(WAIT_S)
        started = time.monotonic()
        server.stop(0.1)
        assert time.monotonic() - started < 10
        with pytest.raises(grpc.RpcError):
            stream.reply()
        gate.open.set()


def test_many_clients_at_once_get_their_own_rows_back() -> None:
    with serving(batch_rows=64) as (_, connect):
        wrong: list[object] = []

        def client(seed: int) -> None:
            stream = connect()
            for turn in range(100):
                number, rows = 1000 * seed + turn, (1, 3, 70, 500)[(seed + turn) % 4]
                reply = stream.ask(frame(number, layer=turn % 3, rows=rows))
                if not is_right(reply, number, rows):
                    wrong.append(reply)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []


def test_large_replies_of_pipelined_requests_arrive_whole() -> None:
    with serving() as (_, connect):
        stream = connect()
        rows = (3 << 20) // (HIDDEN * 4)
        stream.send(*(frame(number, rows=rows) for number in range(6)))
        for _ in range(6):
            reply = stream.reply()
            assert is_right(reply, reply.frame_id, rows)


def test_a_grpcio_without_what_we_use_of_it_is_named_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(frame_server._NEEDED, frame_server.cygrpc, ("Server", "NoLongerThere"))
    with pytest.raises(StartupError, match=rf"grpcio {grpc.__version__} has no NoLongerThere .* lock file"):
        ExpertServer(twice, HIDDEN, MODEL, DispatchConfig())


def test_a_stream_that_comes_as_the_server_stops_is_refused_quietly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_call = FrameServer._on_call

    def stopped_first(self: FrameServer, event: object) -> None:
        self.shut_down()
        on_call(self, event)

    monkeypatch.setattr(FrameServer, "_on_call", stopped_first)
    with serving() as (server, connect):
        stream = connect()
        with pytest.raises(grpc.RpcError):
            stream.ask(frame())
        assert stream.call.code() is grpc.StatusCode.UNAVAILABLE
        assert stream.call.details() == "this worker is being stopped"
        server.stop(WAIT_S)
    assert caplog.records == []
