"""Moves experts when the load of lately makes it worth it: `routing.tokens.rebalancing` decides, this carries it out.

Legend: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from cluster.config import ExpertsConfig
from monitoring.metrics import DirectoryMetrics
from routing.tokens.balancing.recent_tokens import RecentTokens
from routing.tokens.membership import Membership, WorkerMember
from routing.tokens.rebalancing import Proposal, RebalanceOptions, has_room, propose, step_s
from routing.tokens.routed_tokens import RoutedTokens

_INTERVALS = 2.0  # that the load looks back
_LEAST_TOKENS = 64.0  # of the mean expert, or a load is chance

logger = logging.getLogger(__name__)


@dataclass
class LastRound:
    """What `deepsplit status` says of the last moves."""

    at: float  # Unix time
    experts: int
    mib: float
    predicted_gain: float  # part of a step's expert time
    measured_gain: float | None = None  # by the load that came after the moves; None: not known yet


class Rebalancer:
    """Not thread-safe; the search itself runs in a thread."""

    def __init__(
        self,
        experts: ExpertsConfig,
        layers: Sequence[int],
        num_experts: int,
        membership: Membership,
        metrics: DirectoryMetrics,
    ) -> None:
        settings = experts.rebalance
        self._interval_s = settings.interval_s
        self._options = RebalanceOptions(
            experts.replicas_per_expert, settings.headroom, int(settings.budget_gib * 2**30), settings.threshold
        )
        self._membership, self._metrics = membership, metrics
        self._tokens = RecentTokens(layers, num_experts, _INTERVALS * settings.interval_s)
        self._before: Mapping[str, np.ndarray] | None = None  # shares before the last moves, until those are measured
        self._moved_s = 0.0
        self._told_why_not = False
        self.last: LastRound | None = None

    def report(self, replica_id: str, total: RoutedTokens, now_s: float) -> None:
        """Take in what an attention replica has counted."""
        self._tokens.report(replica_id, total, now_s)

    def keep_only(self, replica_ids: Collection[str]) -> None:
        """Forget the counts of all other attention replicas."""
        self._tokens.keep_only(replica_ids)

    async def run(self) -> bool:
        """Wait for the next time, and see. Returns whether experts are to move."""
        await asyncio.sleep(self._interval_s)
        fixed = [m.worker_id for m in self._membership.members() if m.state == "ready" and not m.elastic]
        if fixed and not self._told_why_not:
            logger.warning("experts do not move with their load: %s cannot load others while they serve (a GPU's, or "
                           "short of memory, or experts.take_over is false)", ", ".join(fixed))  # fmt: skip
        self._told_why_not = bool(fixed)
        tokens_LE = self._tokens.at(time.monotonic())
        if not has_room(self._membership.members()):
            return False  # an optimisation must not take the memory that a failover needs
        if tokens_LE.mean() < _LEAST_TOKENS or not self._membership.settled():
            return False
        members, shares = self._membership.members(), self._membership.shares()
        first = self._membership.first_experts()
        try:
            proposal = await asyncio.to_thread(propose, tokens_LE, members, shares, first, self._options)
            self._metrics.balancedness.set(proposal.plan.redivided.balancedness)
            await self._measure(tokens_LE, members, shares)
        except ValueError as error:
            logger.warning("the load of the experts was not balanced: %s", error)
            return False
        unchanged = self._membership.settled() and self._membership.shares().keys() == shares.keys()
        if not (proposal.worth_it and unchanged):
            return False
        self._move(proposal, shares)
        return True

    async def _measure(
        self, tokens_LE: np.ndarray, members: Sequence[WorkerMember], shares: Mapping[str, np.ndarray]
    ) -> None:
        """Say what the last moves have won, once most of the load is younger than they are."""
        if self._before is None or time.monotonic() - self._moved_s < _INTERVALS * self._interval_s:
            return
        before, self._before = self._before, None
        if before.keys() != shares.keys() or self.last is None:
            return
        then_s = await asyncio.to_thread(step_s, tokens_LE, members, before, self._options)
        now_s = await asyncio.to_thread(step_s, tokens_LE, members, shares, self._options)
        self.last.measured_gain = 1 - now_s / then_s
        self._metrics.measured_gain.set(self.last.measured_gain)
        logger.info("the last moves save %.1f %% of a step's expert time, by the load since; predicted were %.1f %%",
                    100 * self.last.measured_gain, 100 * self.last.predicted_gain)  # fmt: skip

    def _move(self, proposal: Proposal, shares: Mapping[str, np.ndarray]) -> None:
        self._membership.reshare(proposal.shares, proposal.weights)
        self._before, self._moved_s = shares, time.monotonic()
        count, mib = len(proposal.plan.moves), proposal.moved_bytes / 2**20
        self.last = LastRound(time.time(), count, mib, proposal.gain)
        metrics = self._metrics
        metrics.rebalances.inc()
        metrics.moves.inc(count)
        metrics.moved_bytes.inc(proposal.moved_bytes)
        metrics.predicted_gain.set(proposal.gain)
        fields = asdict(self.last) | {"balancedness": proposal.plan.redivided.balancedness}
        logger.info("%d copies of experts move, %.0f MiB: that saves %.1f %% of a step's expert time", count, mib,
                    100 * proposal.gain, extra={"fields": fields})  # fmt: skip
