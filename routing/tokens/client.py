"""The attention side of the expert plane: it sends rows, receives sums, and holds the only retry loop.

Legend: T rows (tokens), H hidden size, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from random import Random

import numpy as np
import torch

from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import DeepsplitError, DispatchTimeout, FrameError, UncoveredExperts, WorkerUnusable
from cluster.tls.grpc_credentials import ExpertChannels
from monitoring.dispatch_meter import DispatchMeter
from routing.tokens.clock import REAL_CLOCK, Clock
from routing.tokens.dispatching.degrade import DegradedLately
from routing.tokens.dispatching.fault_book import FaultBook
from routing.tokens.dispatching.links import Links
from routing.tokens.dispatching.pace import Pace
from routing.tokens.dispatching.placement_watch import PlacementWatch, Plane
from routing.tokens.dispatching.planner import Planner
from routing.tokens.dispatching.receiver import Receiver
from routing.tokens.dispatching.sender import Sender
from routing.tokens.dispatching.stopwatch import Stopwatch
from routing.tokens.dispatching.watchdog import Watchdog
from routing.tokens.in_flight import Dispatch, SentPart
from routing.tokens.link import WorkerLink
from routing.tokens.link_poller import LinkPoller
from routing.tokens.placement import PlacementFile, PlacementTable, WorkerEndpoint
from routing.tokens.plane_state import FRESH_S, ExpertPlaneFile, PlaneReport
from routing.tokens.request_ids import STEP_REQUEST_IDS
from routing.tokens.routed_tokens import RoutedTokensCounter
from routing.tokens.wire import NO_EXPERT, WireRows

_POLL_S = 0.02  # how often a dispatch without a holder looks at the placement file
_WATCHDOG_S = 0.05  # resolution of call_timeout_s, and how soon a new placement table is seen


@dataclass(frozen=True)
class ExpertShape:
    """What attention and expert workers must agree on; a worker refuses the stream of a client of another model."""

    model_id: str
    hidden_size: int
    num_experts: int


class ExpertClient:
    """Computes routed experts on remote workers. Thread-safe: several dispatches may be in flight at once, begun and
    finished by one thread or by several.
    """

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
        counter: RoutedTokensCounter | None = None,
        link_class: Callable[..., WorkerLink] = WorkerLink,
        clock: Clock = REAL_CLOCK,
        random: Random | None = None,
        start_watchdog: Callable[[float, Sequence[Callable[[], object]]], Watchdog] = Watchdog,
    ) -> None:
        """`dispatch_dtype`: float32, bfloat16, float16 or float8_e4m3fn, in which hidden states travel; sums come back
        in `combine_dtype`, one of the first three. `tls`: mutual TLS with the workers; plain TCP without. The client
        writes into `plane_file` how long rows wait at the workers, and tells `meter` how each dispatch went and
        `counter` which experts it asked for. The last four are for simulations.

        Raises StartupError when the files of `tls` cannot be used.
        """
        channels = None if tls is None else ExpertChannels(tls)

        def open_link(worker: WorkerEndpoint) -> WorkerLink:
            return link_class(worker.address, shape.model_id, settings, channels, self._poller)

        self.meter = meter
        self._counter = counter
        self._now, self._sleep = clock.monotonic, clock.sleep
        self._random = random or Random()
        self._settings = settings
        self._num_experts = shape.num_experts
        self._dispatch_dtype = dispatch_dtype
        self._abandoned: SimpleQueue[SentPart] = SimpleQueue()
        self._faults = FaultBook(meter, clock)
        self._poller = LinkPoller()
        self._degraded = DegradedLately(FRESH_S)
        self._report = PlaneReport(plane_file, self._degraded.at)
        self._links = Links(open_link, settings.call_timeout_s, clock)
        self._placement = PlacementWatch(
            placement, shape.num_experts, lambda table: self._links.prepare(table.workers), self._adopted
        )
        self._sender = Sender(settings, self._links, shape.hidden_size, dispatch_dtype, combine_dtype, clock)
        pace = Pace()
        self._receiver = Receiver(
            settings, self._links, self._faults, pace, shape.hidden_size, self._elsewhere, clock
        )
        self._planner = Planner(settings, self._faults)
        self._watchdog = start_watchdog(
            _WATCHDOG_S,
            (
                self._tend_links,
                self._forget_abandoned,
                self._placement.refresh,
                lambda: self._placement.reweigh(lambda workers: pace.factors(workers, self._now())),
                lambda: self._report.write(self._now()),
                *(() if counter is None else (lambda: counter.tend(self._now()),)),
            ),
        )

    def forward(
        self,
        layer: int,
        hidden_TH: torch.Tensor,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        meanwhile: Callable[[], None] = lambda: None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """`begin`, then `meanwhile` while the rows are away, then `finish`."""
        dispatch = self.begin(layer, hidden_TH, expert_ids_TK, weights_TK)
        try:
            meanwhile()
        except BaseException:
            self.abandon(dispatch)
            raise
        return self.finish(dispatch, dtype)

    def begin(
        self, layer: int, hidden_TH: torch.Tensor, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Dispatch:
        """Send rows to their experts.

        `hidden_TH` any float dtype, `expert_ids_TK` any integer dtype (global ids; -1 for none), `weights_TK` any float
        dtype; all on the CPU, and unchanged until the dispatch is finished. One that is never finished (drop it, or
        `abandon` it) costs nothing but its answers. Raises UncoveredExperts, or FrameError.
        """
        now = self._now()
        expert_ids = expert_ids_TK.numpy()
        if expert_ids.max(initial=NO_EXPERT) >= self._num_experts or expert_ids.min(initial=NO_EXPERT) < NO_EXPERT:
            raise FrameError(f"layer {layer}: an expert id is not one of -1 to {self._num_experts - 1}")
        weights = weights_TK if weights_TK.dtype == torch.float32 else weights_TK.to(torch.float32)
        dispatch = Dispatch(
            layer, hidden_TH, WireRows.of(hidden_TH, self._dispatch_dtype), weights.contiguous().numpy(),
            expert_ids.astype(np.int16, order="C"), STEP_REQUEST_IDS.get(), self._random.getrandbits(16),
            now + self._settings.dispatch_timeout_s,
            Stopwatch(len(hidden_TH), now), self._abandoned,
        )  # fmt: skip
        try:
            self._send_remaining(dispatch, self._placement.current())
        except BaseException as error:
            self._end(dispatch, error)
            raise
        return dispatch

    def finish(self, dispatch: Dispatch, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weighted sum of the routed experts [T, H], in `dtype` or else in that of the hidden states: summed in
        float32, rounded once.

        Holds the only retry loop: rows that did not come back are split again against the newest table; experts are
        pure functions, so a repeat is safe. Raises UncoveredExperts, DispatchTimeout, FrameError when every holder
        refuses the rows, or WorkerFailing when the kernels of several failed on them.
        """
        watch = dispatch.stopwatch
        watch.meanwhile_done()
        ended: BaseException | None = None
        try:
            lost = self._receiver.collect(dispatch)
            while dispatch.pending:
                self._check_deadline(dispatch, lost)
                dispatch.send_again()
                self._send_remaining(dispatch, self._placement.refresh())
                lost = self._receiver.collect(dispatch)
            now = self._now()
            output_TH = dispatch.output(dtype or dispatch.hidden_dtype)
            watch.sample.combine_s += self._now() - now
            self._report.add(dispatch.layer, dispatch.queue_s, now)
            if dispatch.setbacks is not None:
                self._blame_who_refused(dispatch)
            if dispatch.degraded_rows:
                self._degraded.note(dispatch.layer, dispatch.degraded_rows, dispatch.request_ids, now)
            return output_TH
        except BaseException as error:
            ended = error
            raise
        finally:
            self._end(dispatch, ended)

    def abandon(self, dispatch: Dispatch) -> None:
        """Give up a dispatch that was begun: its replies are thrown away."""
        while dispatch.sent:
            dispatch.sent.pop().forget()

    def close(self) -> None:
        """End all streams."""
        self._watchdog.stop()
        self._links.close()
        self._poller.stop()

    def _send_remaining(self, dispatch: Dispatch, plane: Plane) -> None:
        began = self._now()
        uncovered_until: float | None = None
        while True:
            planned = self._planner.plan(dispatch, plane, began)
            if planned.resume_s is not None:
                self._check_deadline(dispatch, "the holders of some experts are busy or failing")
                self._sleep(min(_POLL_S, max(0.0, planned.resume_s - began)))
                waited_s = self._now() - began
                dispatch.queue_s += waited_s
                dispatch.stopwatch.sample.backoff_s += waited_s
            elif not planned.uncovered:
                break
            elif self._settings.on_uncovered == "degrade" and dispatch.go_without(planned.uncovered):
                continue
            else:
                if uncovered_until is None:
                    uncovered_until = min(began + self._settings.uncovered_timeout_s, dispatch.deadline)
                self._wait_for_holder(dispatch, planned.uncovered, uncovered_until)
                dispatch.stopwatch.sample.uncovered_wait_s += self._now() - began
            began = self._now()
            plane = self._placement.refresh()
        dispatch.stopwatch.sample.pack_s += self._now() - began
        self._sender.send(dispatch, planned.split.parts, plane.table)

    def _wait_for_holder(self, dispatch: Dispatch, experts: tuple[int, ...], until: float) -> None:
        fail = self._settings.on_uncovered == "fail"
        if fail or self._now() >= until:
            bound = "dispatch_timeout_s" if until >= dispatch.deadline else "uncovered_timeout_s"
            raise UncoveredExperts(
                f"layer {dispatch.layer}: no live expert worker holds expert(s) {', '.join(map(str, experts[:8]))}"
                f"{'...' if len(experts) > 8 else ''}{'' if fail else f' after dispatch.{bound}'}; see "
                f"`deepsplit status`, and experts.replicas_per_expert for redundant experts{self._faults.explain()}"
            )
        self._sleep(_POLL_S)

    def _elsewhere(self, dispatch: Dispatch, sent: SentPart) -> bool:
        return self._planner.elsewhere(dispatch, sent, self._placement.current(), self._now())

    def _check_deadline(self, dispatch: Dispatch, why: object) -> None:
        if self._now() >= dispatch.deadline:
            raise DispatchTimeout(f"layer {dispatch.layer}: dispatch.dispatch_timeout_s passed; last: {why}")

    def _blame_who_refused(self, dispatch: Dispatch) -> None:
        """Others took the rows of frames that some workers refused: those workers are not of our version."""
        for worker_id, error in dispatch.met().refused.items():
            self._faults.set_aside(
                worker_id, WorkerUnusable(f"it refuses what other workers take: {error}"), dispatch.request_ids
            )

    def _tend_links(self) -> None:
        for worker_id, error in self._links.tend():
            if isinstance(error, WorkerUnusable):
                self._faults.set_aside(worker_id, error)
            else:
                self._faults.lost(worker_id, error)

    def _end(self, dispatch: Dispatch, error: BaseException | None) -> None:
        self.abandon(dispatch)
        watch = dispatch.stopwatch
        watch.ended()
        if isinstance(error, DeepsplitError):
            watch.sample.failure = error.outcome
        watch.sample.degraded_rows = dispatch.degraded_rows
        if self.meter is not None:
            self.meter.record(watch.sample)
        if self._counter is not None:
            self._counter.record(dispatch.layer, dispatch.expert_ids_TK)

    def _adopted(self, table: PlacementTable) -> None:
        live = {worker.worker_id for worker in table.workers}
        self._links.retire_all_but(live)
        self._faults.adopted(table.stamp, live)
        if self.meter is not None:
            self.meter.placement(table.stamp.n, live)

    def _forget_abandoned(self) -> None:
        for _ in range(self._abandoned.qsize()):
            self._abandoned.get().forget()
