"""Who gets the rows of a dispatch now, by the placement table, the workers' conditions, and what the dispatch met.

Legend: T rows (tokens), K experts per token, E experts of the layer, Q turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cluster.config import DispatchConfig
from cluster.errors import FrameError
from routing.tokens.dispatching.fault_book import FaultBook
from routing.tokens.dispatching.placement_watch import Plane
from routing.tokens.dispatching.routes import UNCOVERED
from routing.tokens.dispatching.worker_conditions import WorkerConditions
from routing.tokens.in_flight import Dispatch, SentPart
from routing.tokens.split_combine import Split, split
from routing.tokens.wire import NO_EXPERT


class Planned(NamedTuple):
    """A split that may be sent if neither of the others is set."""

    split: Split
    uncovered: tuple[int, ...] = ()  # experts that no usable worker holds
    resume_s: float | None = None  # monotonic; the only holders of some experts asked for a pause until then


class Planner:
    """Decides, sends nothing."""

    def __init__(self, settings: DispatchConfig, faults: FaultBook) -> None:
        self._pauses_s = (settings.lost_worker_pause_s, settings.reconnect_interval_s)
        self._faults = faults

    def plan(self, dispatch: Dispatch, plane: Plane, now_s: float) -> Planned:
        """Split what remains to be sent. Workers that were lost lately are tried only where nobody else holds an
        expert. Raises FrameError if all holders of some experts refused the frame.
        """
        conditions, setbacks = self._faults.conditions, dispatch.setbacks
        if setbacks is None and conditions.all_well:
            planned = split(dispatch.remaining_TK, plane.routes.layer(dispatch.layer))
            return Planned(planned, planned.uncovered)
        held_back = setbacks.held_back(now_s) if setbacks is not None else frozenset()
        long_s, short_s = self._pauses_s
        excluded = conditions.excluded(long_s, now_s)
        planned = _split(dispatch, plane, conditions, excluded | held_back)
        if not planned.uncovered:
            return Planned(planned)
        if excluded:
            excluded = conditions.excluded(short_s, now_s)
            planned = _split(dispatch, plane, conditions, excluded | held_back)
            if not planned.uncovered:
                return Planned(planned)
        if setbacks is None:
            return Planned(planned, planned.uncovered)
        refused = setbacks.refused
        without_pauses = _split(dispatch, plane, conditions, excluded.union(refused))
        if not without_pauses.uncovered:
            pending = [until_s for until_s in setbacks.until_s.values() if until_s > now_s]
            return Planned(planned, resume_s=min(pending))
        if refused and not _split(dispatch, plane, conditions, excluded).uncovered:
            last = list(refused.values())[-1]
            raise FrameError(f"layer {dispatch.layer}: every holder of some experts refused the rows, the last: {last}")
        return Planned(planned, without_pauses.uncovered)


    def elsewhere(self, dispatch: Dispatch, sent: SentPart, plane: Plane, now_s: float) -> bool:
        """Return whether workers that are well hold all experts of a part, without the one that it was sent to."""
        excluded = self._faults.conditions.excluded(self._pauses_s[0], now_s) | {sent.worker_id}
        route_EQ = _route(dispatch, plane, self._faults.conditions, excluded)
        ids_P = sent.part.expert_ids_RK.ravel()
        return bool((route_EQ[ids_P[ids_P != NO_EXPERT]] != UNCOVERED).all())


def _split(dispatch: Dispatch, plane: Plane, conditions: WorkerConditions, excluded: frozenset[str]) -> Split:
    return split(dispatch.remaining_TK, _route(dispatch, plane, conditions, excluded), dispatch.salt)


def _route(dispatch: Dispatch, plane: Plane, conditions: WorkerConditions, excluded: frozenset[str]) -> np.ndarray:
    route_EQ = plane.routes.layer(dispatch.layer, excluded)
    stale = conditions.stale.get(dispatch.layer)
    if stale and conditions.stamp == plane.table.stamp:
        route_EQ = _without_stale(route_EQ, stale, dispatch.layer, plane, excluded)
    return route_EQ


def _without_stale(
    route_EQ: np.ndarray, stale: Mapping[int, frozenset[str]], layer: int, plane: Plane, excluded: frozenset[str]
) -> np.ndarray:
    """Return the route with other holders for the experts that some workers were found not to hold."""
    route_EQ = route_EQ.copy()
    for expert, workers in stale.items():
        out = [at for at, worker in enumerate(plane.table.workers) if worker.worker_id in workers]
        others_Q = plane.routes.layer(layer, excluded | workers)[expert]
        route_EQ[expert] = np.where(np.isin(route_EQ[expert], out), others_Q, route_EQ[expert])
    return route_EQ
