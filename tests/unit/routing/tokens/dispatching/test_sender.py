"""What the frames of a dispatch carry."""

from __future__ import annotations

import time
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from cluster.config import DispatchConfig
from routing.tokens.dispatching.links import Links
from routing.tokens.dispatching.sender import Sender
from routing.tokens.dispatching.stopwatch import Stopwatch
from routing.tokens.in_flight import Dispatch
from routing.tokens.placement import PlacementTable, Stamp, WorkerEndpoint
from routing.tokens.split_combine import split
from routing.tokens.wire import WireRows, decode_request

HIDDEN = 4
TABLE = PlacementTable.of(Stamp(1, 7), [WorkerEndpoint(name, f"{name}:1", {1: (at,)}) for at, name in enumerate("abc")])


class KeepsFrames:
    """A link that sends nothing."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def send(self, frame: bytes) -> None:
        self.frames.append(frame)

    def forget(self, frame_id: int) -> None:
        pass


@pytest.mark.parametrize(("left_s", "expected_ms"), [(60.0, (29_900, 30_000)), (5.0, (4_900, 5_000)), (-1.0, (0, 0))])
def test_all_frames_of_an_attempt_share_a_deadline_within_the_dispatch(
    left_s: float, expected_ms: tuple[int, int]
) -> None:
    link, settings = KeepsFrames(), DispatchConfig(call_timeout_s=30.0)
    sender = Sender(settings, Links(lambda worker: link, 30.0), HIDDEN, torch.float32, torch.float32)  # type: ignore[arg-type, return-value]
    hidden_TH, ids_TK = torch.ones(2, HIDDEN), np.array([[0, 1, 2], [0, 1, 2]], dtype=np.int16)
    now = time.monotonic()
    dispatch = Dispatch(
        1, hidden_TH, WireRows.of(hidden_TH, torch.float32), np.ones((2, 3), dtype=np.float32), ids_TK, "", 0,
        now + left_s, Stopwatch(2, now), SimpleQueue(),
    )  # fmt: skip
    sender.send(dispatch, split(ids_TK, TABLE.routes(3).layer(1)).parts, TABLE)
    sent = [decode_request(frame, HIDDEN) for frame in link.frames]
    assert len(sent) == 3
    assert {request.epoch for request in sent} == {dispatch.stamp.n} == {7}
    low, high = expected_ms
    assert all(low <= request.deadline_ms <= high for request in sent)
    assert dispatch.attempt_deadline == pytest.approx(now + min(left_s, 30.0), abs=0.1)
