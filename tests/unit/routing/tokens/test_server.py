"""The batcher: who computes for whom, and what each request is told of its wait. The clock is ours. And the worker's
log lines.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import pytest
import torch

from cluster.config import DispatchConfig
from cluster.errors import DispatchTimeout, FrameError
from routing.tokens.server import ComputeExperts, ExpertServer, LayerBatcher, _QueuedRequest
from routing.tokens.wire import DispatchReply, DispatchRequest, ErrorReply, decode_reply, encode_request


def request(layer: int, deadline_ms: int = 60_000) -> DispatchRequest:
    ids_TK = torch.zeros(2, 1, dtype=torch.int16)
    return DispatchRequest(1, 1, layer, deadline_ms, torch.ones(2, 4), ids_TK, torch.ones(2, 1), torch.float32)


class Gated:
    """Experts that take as long as the test says; `seconds` is the clock, which each computation moves by one."""

    def __init__(self) -> None:
        self.seconds = 100.0
        self.batches: list[tuple[int, int]] = []  # (layer, rows)
        self.done: list[_QueuedRequest] = []
        self.entered, self.open = threading.Event(), threading.Event()
        self.batcher = LayerBatcher(self._compute, clock=lambda: self.seconds)

    def _compute(
        self, layer: int, hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        self.entered.set()
        assert self.open.wait(30)
        self.batches.append((layer, len(hidden_TH)))
        self.seconds += 1.0
        return hidden_TH

    def submit(self, item: DispatchRequest) -> threading.Thread:
        """In a thread of its own; the result goes to `done`."""
        thread = threading.Thread(target=lambda: self.done.append(self.batcher.submit(item)))
        thread.start()
        return thread


def run(gated: Gated, *waiting: DispatchRequest, meanwhile_s: float) -> dict[int, list[_QueuedRequest]]:
    """One request of layer 1 computes; `waiting` come, wait for `meanwhile_s`, and then all are answered; by layer."""
    threads = [gated.submit(request(1))]
    assert gated.entered.wait(30)
    for count, item in enumerate(waiting, start=1):
        threads.append(gated.submit(item))
        while len(gated.batcher._waiting) < count:
            time.sleep(0.001)
    gated.seconds += meanwhile_s
    gated.open.set()
    for thread in threads:
        thread.join(30)
    by_layer: dict[int, list[_QueuedRequest]] = {}
    for work in gated.done:
        by_layer.setdefault(work.request.layer, []).append(work)
    return by_layer


def test_waits_are_from_arrival_to_the_start_of_the_own_computation() -> None:
    gated = Gated()
    done = run(gated, request(2), request(3), request(2), meanwhile_s=5.0)
    assert gated.batches == [(1, 2), (2, 4), (3, 2)]  # rows of one layer are joined
    assert [work.queue_us for work in done[1]] == [0]
    # 5 s, and the second that the first request's computation took.
    assert [work.queue_us for work in done[2]] == [6_000_000, 6_000_000]
    assert [work.queue_us for work in done[3]] == [7_000_000]
    assert {work.compute_us for works in done.values() for work in works} == {1_000_000, 6_000_000}


def test_a_deadline_that_passed_in_the_queue_costs_no_computation() -> None:
    gated = Gated()
    done = run(gated, request(2, deadline_ms=3000), meanwhile_s=5.0)
    assert gated.batches == [(1, 2)]
    assert isinstance(done[2][0].error, DispatchTimeout)


def frame(layer: int, request_ids: str, deadline_ms: int = 60_000) -> bytes:
    return encode_request(replace(request(layer, deadline_ms), request_ids=request_ids))


def server_of(experts: ComputeExperts) -> ExpertServer:
    return ExpertServer(experts, 4, "model", DispatchConfig())


def test_what_is_refused_late_or_fails_is_logged_with_its_request_ids(caplog: pytest.LogCaptureFixture) -> None:
    def experts(layer: int, hidden_TH: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if layer == 9:
            raise FrameError("unknown layer 9")
        if layer == 8:
            raise ZeroDivisionError
        return hidden_TH

    server = server_of(experts)
    for refused in (frame(1, "cmpl-a,cmpl-b")[:-40] + b"cmpl-a,cmpl-b", frame(9, "cmpl-c"), frame(8, "cmpl-d"),
                    frame(1, "cmpl-e", deadline_ms=0)):  # fmt: skip
        assert isinstance(decode_reply(server._answer(refused)), ErrorReply)
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
    server = server_of(lambda layer, hidden_TH, ids_TK, weights_TK: hidden_TH)
    assert isinstance(decode_reply(server._answer(frame(3, "cmpl-a,cmpl-b"))), DispatchReply)
    assert caplog.records == []
    with caplog.at_level(logging.DEBUG, logger="routing.tokens.server"):
        server._answer(frame(3, "cmpl-a,cmpl-b"))
    (line,) = caplog.records
    assert line.fields["request_id"] == "cmpl-a,cmpl-b"  # type: ignore[attr-defined]
    assert (line.fields["layer"], line.fields["rows"]) == (3, 2)  # type: ignore[attr-defined]
