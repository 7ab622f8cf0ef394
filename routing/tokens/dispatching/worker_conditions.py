"""What an engine knows of its expert workers: a value, with the time passed in. No locks, no log, no clock.

Each condition has a name, and ends in a way of its own:

- *lost*: the link broke or a reply did not come. No rows for a while, then again.
- *late*: a reply takes much longer than usual. No rows for a second while others have its experts, then again.
- *set aside*: of another model, weights or wire version, or out of service by its own word. No rows any more.
- *stale*: the worker does not hold an expert that the placement table says it holds. That entry is out until the next
  table; the rest of the worker is well.

A worker that is busy, or that fails once, is well for everybody but the dispatch that met it (see `setbacks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from routing.tokens.placement import NO_TABLE, Stamp

_NOBODY: frozenset[str] = frozenset()
_LATE_PAUSE_S = 1.0  # one dispatch a second finds out whether a late worker is well again


@dataclass(frozen=True, slots=True)
class WorkerConditions:
    """Immutable: each event returns the conditions after it, so threads may read them without a lock."""

    stamp: Stamp = NO_TABLE  # of the newest placement table
    lost_at: Mapping[str, float] = field(default_factory=dict)  # worker_id -> monotonic seconds of its last loss
    late_at: Mapping[str, float] = field(default_factory=dict)  # worker_id -> monotonic seconds, the last time
    aside: Mapping[str, str] = field(default_factory=dict)  # worker_id -> outcome of the error that said so
    stale: Mapping[int, Mapping[int, frozenset[str]]] = field(default_factory=dict)  # layer -> expert -> worker_ids

    def lost(self, worker_id: str, now_s: float) -> WorkerConditions:
        """The worker's link broke, or it was silent."""
        return replace(self, lost_at={**self.lost_at, worker_id: now_s})

    def late(self, worker_id: str, now_s: float) -> WorkerConditions:
        """The worker takes much longer than usual."""
        return replace(self, late_at={**self.late_at, worker_id: now_s})

    def set_aside(self, worker_id: str, outcome: str) -> WorkerConditions:
        """The worker will never be of use."""
        return replace(self, aside={**self.aside, worker_id: outcome})

    def found_stale(self, worker_id: str, layer: int, experts: Set[int], stamp: Stamp) -> WorkerConditions:
        """The worker does not hold these experts, which the table with this stamp says it holds."""
        if stamp != self.stamp:
            return self  # there is another table already
        of_layer = dict(self.stale.get(layer, {}))
        for expert in experts:
            of_layer[expert] = of_layer.get(expert, _NOBODY) | {worker_id}
        return replace(self, stale={**self.stale, layer: of_layer})

    def answered(self, worker_id: str) -> WorkerConditions:
        """A reply came: the worker is neither lost nor late."""
        lost_at = {lost: at for lost, at in self.lost_at.items() if lost != worker_id}
        return replace(self, lost_at=lost_at, late_at={w: at for w, at in self.late_at.items() if w != worker_id})

    def adopted(self, stamp: Stamp, live: Set[str]) -> WorkerConditions:
        """A new placement table is in use, with these workers."""
        return WorkerConditions(
            stamp,
            {worker_id: at for worker_id, at in self.lost_at.items() if worker_id in live},
            {worker_id: at for worker_id, at in self.late_at.items() if worker_id in live},
            {worker_id: outcome for worker_id, outcome in self.aside.items() if worker_id in live},
        )

    @property
    def all_well(self) -> bool:
        """Whether no worker has any condition."""
        return not (self.lost_at or self.late_at or self.aside or self.stale)

    def excluded(self, pause_s: float, now_s: float) -> frozenset[str]:
        """Return who gets no rows: those set aside, those lost in the last `pause_s` seconds, and those that were late
        in the last second of them.
        """
        lost = (worker_id for worker_id, at in self.lost_at.items() if at > now_s - pause_s)
        late = (worker_id for worker_id, at in self.late_at.items() if at > now_s - min(pause_s, _LATE_PAUSE_S))
        return frozenset((*lost, *late, *self.aside))
