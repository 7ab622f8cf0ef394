"""The attention side of the expert plane: it sends rows, receives sums, and holds the only retry loop.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch

from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import DeepsplitError, DispatchTimeout, StalePlacement, UncoveredExperts, WorkerLost
from cluster.tls.grpc_credentials import ExpertChannels
from monitoring.dispatch_meter import DispatchMeter
from routing.tokens.in_flight import InFlight, ReceivedPart, SentPart
from routing.tokens.link import WorkerLink
from routing.tokens.placement import PlacementFile, PlacementTable, WorkerEndpoint
from routing.tokens.plane_state import FRESH_S, ExpertPlaneFile, ExpertPlaneState, StepQueueTime
from routing.tokens.request_ids import STEP_REQUEST_IDS
from routing.tokens.split_combine import Part, Split, split
from routing.tokens.wire import HEADER_BYTES, MAX_REQUEST_IDS_BYTES, DispatchRequest, encode_request, request_bytes

logger = logging.getLogger(__name__)

_POLL_S = 0.02  # how often a dispatch without a holder looks at the placement file
_WATCHDOG_S = 0.1  # resolution of call_timeout_s, and how often the load file is written at most


@dataclass(frozen=True)
class ExpertShape:
    """What attention and expert workers must agree on; a worker refuses the stream of a client of another model."""

    model_id: str
    hidden_size: int
    num_experts: int


class ExpertClient:
    """Computes routed experts on remote workers. Thread-safe: threads take turns, one dispatch at a time."""

    def __init__(
        self,
        settings: DispatchConfig,
        shape: ExpertShape,
        placement: PlacementFile,
        dispatch_dtype: torch.dtype,
        combine_dtype: torch.dtype,
        tls: InternalTlsConfig | None = None,
        plane_file: ExpertPlaneFile | None = None,
        meter: DispatchMeter | None = None,
    ) -> None:
        """`tls`: mutual TLS with the workers; plain TCP without. The client writes into `plane_file` how long rows wait
        at the workers, and tells `meter` how each dispatch went.

        Raises StartupError when the files of `tls` cannot be used.
        """
        self._settings = settings
        self._shape = shape
        self._placement = placement
        self._dispatch_dtype = dispatch_dtype
        self._combine_dtype = combine_dtype
        self._channels = None if tls is None else ExpertChannels(tls)
        self._plane_file = plane_file
        self.meter = meter
        self._queue = StepQueueTime()
        self._ids = count(1)
        self._lock = threading.Lock()
        self._links: dict[str, WorkerLink] = {}  # worker_id -> live link
        self._lost_at: dict[str, float] = {}  # worker_id -> monotonic seconds of its last loss
        self._degraded_at = float("-inf")  # monotonic seconds
        self._last_loss = ""  # for the message that says that nobody is left
        self._table = PlacementTable(-1, ())
        self._routes: dict[tuple[int, frozenset[str]], np.ndarray] = {}
        self._stop = threading.Event()
        threading.Thread(target=self._watch, name="dispatch-watchdog", daemon=True).start()

    def forward(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> torch.Tensor:
        """The weighted sum of the routed experts, float32 [T, H]; `meanwhile` runs while the rows are away.

        `hidden_TH` any float dtype, `expert_ids_TK` any integer dtype (global ids), `weights_TK` any float dtype; all
        on the CPU. Holds the only retry loop: rows of a lost worker are split again against the newest table; experts
        are pure functions, so a repeat is safe. Raises UncoveredExperts, DispatchTimeout, or FrameError (never worth
        a retry).
        """
        now, chosen_TK = time.monotonic(), expert_ids_TK.numpy()
        dispatch = InFlight(
            layer,
            hidden_TH.to(self._dispatch_dtype).contiguous(),
            weights_TK.to(torch.float32).contiguous(),
            chosen_TK.astype(np.int16),
            now + self._settings.dispatch_timeout_s,
            now + self._settings.uncovered_timeout_s,
        )
        with self._lock:
            try:
                self._send_remaining(dispatch)
                meanwhile()
                dispatch.meanwhile_done()
                lost = self._collect(dispatch)
                while dispatch.pending:
                    if time.monotonic() > dispatch.deadline:
                        raise DispatchTimeout(f"layer {layer}: dispatch.dispatch_timeout_s passed; last: {lost}")
                    self._send_remaining(dispatch)
                    lost = self._collect(dispatch)
                self._queue.add(layer, dispatch.sample.wait_s, time.monotonic())
                if dispatch.sample.degraded_rows:
                    self._degraded(layer, dispatch.sample.degraded_rows)
                return dispatch.output()
            except DeepsplitError as error:
                dispatch.sample.failure = error.outcome
                raise
            finally:
                dispatch.sample.total_s = time.monotonic() - now
                if self.meter is not None:
                    self.meter.record(dispatch.sample, layer, chosen_TK)
                # Replies of an abandoned dispatch must not wait in a stream for the next one.
                for sent in dispatch.sent:
                    self._drop(sent.worker_id)

    def close(self) -> None:
        """End all streams."""
        self._stop.set()
        with self._lock:
            for worker_id in list(self._links):
                self._drop(worker_id)

    # --- sending ---

    def _send_remaining(self, dispatch: InFlight) -> None:
        began = time.monotonic()
        while True:
            table, planned = self._split(dispatch)
            if not planned.uncovered:
                break
            if self._settings.on_uncovered == "degrade" and dispatch.go_without(planned.uncovered):
                continue
            self._wait_for_holder(dispatch.layer, planned.uncovered, dispatch.uncovered_deadline)
            dispatch.sample.uncovered_wait_s += time.monotonic() - began
            began = time.monotonic()
        dispatch.sample.pack_s += time.monotonic() - began
        dispatch.sent = [self._send_part(dispatch, part, table) for part in planned.parts]
        dispatch.all_sent()

    def _split(self, dispatch: InFlight) -> tuple[PlacementTable, Split]:
        table = self._placement.current()
        if table.epoch != self._table.epoch:
            self._adopt(table)
        planned = self._split_without(dispatch, self._lost_within(self._settings.lost_worker_pause_s))
        if planned.uncovered:
            planned = self._split_without(dispatch, self._lost_within(self._settings.reconnect_interval_s))
        return table, planned

    def _lost_within(self, pause_s: float) -> frozenset[str]:
        since = time.monotonic() - pause_s
        return frozenset(worker_id for worker_id, lost_at in self._lost_at.items() if lost_at > since)

    def _split_without(self, dispatch: InFlight, excluded: frozenset[str]) -> Split:
        key = (dispatch.layer, excluded)
        if key not in self._routes:
            self._routes[key] = self._table.route(dispatch.layer, self._shape.num_experts, excluded)
        return split(dispatch.remaining_TK, self._routes[key])

    def _adopt(self, table: PlacementTable) -> None:
        live = {worker.worker_id for worker in table.workers}
        for worker_id in [w for w in self._links if w not in live]:
            self._drop(worker_id)
        self._lost_at = {w: at for w, at in self._lost_at.items() if w in live}
        self._routes.clear()
        self._table = table
        if self.meter is not None:
            self.meter.placement(table.epoch, live)

    def _wait_for_holder(self, layer: int, experts: tuple[int, ...], wait_until: float) -> None:
        if self._settings.on_uncovered == "fail" or time.monotonic() > wait_until:
            waited = "" if self._settings.on_uncovered == "fail" else " after dispatch.uncovered_timeout_s"
            raise UncoveredExperts(
                f"layer {layer}: no live expert worker holds expert(s) {', '.join(map(str, experts[:8]))}"
                f"{'...' if len(experts) > 8 else ''}{waited}; see `deepsplit status`, and "
                f"experts.replicas_per_expert for redundant experts{self._last_loss}"
            )
        time.sleep(_POLL_S)

    def _degraded(self, layer: int, rows: int) -> None:
        now = time.monotonic()
        if now - self._degraded_at > FRESH_S:
            fields = {"request_id": STEP_REQUEST_IDS.get(), "layer": layer, "rows": rows}
            logger.warning("degraded: some rows are computed without all of their experts", extra={"fields": fields})
        self._degraded_at = now

    def _link(self, worker: WorkerEndpoint) -> WorkerLink:
        if worker.worker_id not in self._links:
            self._links[worker.worker_id] = WorkerLink(
                worker.address, self._shape.model_id, self._settings, self._channels
            )
        return self._links[worker.worker_id]

    def _send_part(self, dispatch: InFlight, part: Part, table: PlacementTable) -> SentPart:
        worker, sample = table.workers[part.worker], dispatch.sample
        link = self._link(worker)
        began = time.monotonic()
        rows_R = torch.from_numpy(part.rows_R)
        whole = len(part.rows_R) == len(dispatch.hidden_TH)
        hidden_RH = dispatch.hidden_TH if whole else dispatch.hidden_TH[rows_R]
        weights_RK = dispatch.weights_TK if whole else dispatch.weights_TK[rows_R]
        ids_RK = torch.from_numpy(part.expert_ids_RK)
        deadline_ms, request_ids = int(self._settings.call_timeout_s * 1000), STEP_REQUEST_IDS.get()
        frames = []
        for rows in self._pieces(len(rows_R), hidden_RH.shape[1], ids_RK.shape[1]):
            request = DispatchRequest(
                next(self._ids), table.epoch, dispatch.layer, deadline_ms,
                hidden_RH[rows], ids_RK[rows], weights_RK[rows], self._combine_dtype, request_ids,
            )  # fmt: skip
            frame = encode_request(request)
            packed = time.monotonic()
            link.send(frame)
            sample.bytes_out += len(frame)
            sample.pack_s += packed - began
            began = time.monotonic()
            sample.send_s += began - packed
            frames.append((request.frame_id, rows))
        return SentPart(part, worker.worker_id, tuple(frames))

    def _pieces(self, rows: int, hidden: int, top_k: int) -> list[slice]:
        """Split rows into ranges whose request and reply both stay under the message bound."""
        widest = max(self._dispatch_dtype, self._combine_dtype, key=lambda dtype: dtype.itemsize)
        per_row = request_bytes(1, hidden, top_k, widest) - HEADER_BYTES
        most = max(1, ((self._settings.max_message_mib << 20) - HEADER_BYTES - MAX_REQUEST_IDS_BYTES) // per_row)
        return [slice(at, min(at + most, rows)) for at in range(0, rows, most)]

    # --- receiving ---

    def _collect(self, dispatch: InFlight) -> Exception | None:
        """Take every outstanding reply. Returns the last error; the rows that it cost stay in `remaining_TK`."""
        lost: Exception | None = None
        outstanding, dispatch.sent = dispatch.sent, []
        for position, sent in enumerate(outstanding):
            try:
                received = self._receive_part(sent, dispatch.deadline)
            except (WorkerLost, StalePlacement, DispatchTimeout) as error:
                lost = error
                dispatch.sample.retries.append(error.outcome)
                self._lose(sent.worker_id, error)
                continue
            except BaseException:
                dispatch.sent = outstanding[position:]
                raise
            self._lost_at.pop(sent.worker_id, None)
            dispatch.take(sent, received)
        dispatch.all_taken()
        return lost

    def _receive_part(self, sent: SentPart, deadline: float) -> ReceivedPart:
        link = self._links.get(sent.worker_id)
        if link is None:
            raise WorkerLost(f"expert worker {sent.worker_id} left the placement")
        pieces, queue_us, compute_us = [], 0, 0
        for frame_id, rows in sent.frames:
            timeout_s = min(self._settings.call_timeout_s, deadline - time.monotonic())
            reply = link.receive(frame_id, timeout_s)
            if reply.output_TH.shape != (rows.stop - rows.start, self._shape.hidden_size):
                raise WorkerLost(f"expert worker {link.address} answered with shape {tuple(reply.output_TH.shape)}")
            pieces.append(reply.output_TH)
            queue_us += reply.queue_us
            compute_us += reply.compute_us
        output_RH = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return ReceivedPart(output_RH, queue_us / 1e6, compute_us / 1e6)

    # --- links ---

    def _lose(self, worker_id: str, error: Exception) -> None:
        self._drop(worker_id)
        self._lost_at[worker_id] = time.monotonic()
        self._last_loss = f"; last lost: {error}"
        self._routes.clear()  # keys name the lost; keep only current ones
        fields = {"worker_id": worker_id, "request_id": STEP_REQUEST_IDS.get()}
        logger.warning("expert worker lost, its rows go elsewhere: %s", error, extra={"fields": fields})

    def _drop(self, worker_id: str) -> None:
        link = self._links.pop(worker_id, None)
        if link is not None:
            link.close()

    def _watch(self) -> None:
        written = 0
        while not self._stop.wait(_WATCHDOG_S):
            for link in list(self._links.values()):
                link.expire(time.monotonic())
            if self._plane_file is not None and self._queue.steps != written:
                written = self._queue.steps
                with contextlib.suppress(OSError):  # advice for admission; dispatches do not depend on it
                    degraded = time.monotonic() - self._degraded_at < FRESH_S
                    self._plane_file.write(ExpertPlaneState(self._queue.mean_s, degraded))
