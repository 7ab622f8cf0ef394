"""A virtual directory: what deployments/directory/replica.py does around the real Membership, and its guarantees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from routing.tokens.membership import Membership
from routing.tokens.placement import NO_TABLE, PlacementTable, Stamp
from routing.tokens.share import Share
from tests.simulation.worker import VirtualWorker

if TYPE_CHECKING:
    from tests.simulation.world import World

HEARTBEAT_TIMEOUT_S = 5.0
_REPLICA_SILENCE_S = 6.0


class VirtualDirectory:
    """One process. Calls reach it through `ask` and `World.call`; those that find it dead are lost."""

    def __init__(self, world: World, shares: Sequence[Share], incarnation: int) -> None:
        self.world, self.incarnation = world, incarnation
        self.alive = True
        self.skew_s = 0.0  # of its clock
        self.membership = Membership(shares, HEARTBEAT_TIMEOUT_S, self.now_s, incarnation)
        self._started_s = self.now_s
        self._in_use: dict[str, Stamp] = {}  # by client: the oldest table that it may still use
        self._heard_s: dict[str, float] = {}

    @property
    def now_s(self) -> float:
        """Its own clock."""
        return self.world.line.now_s + self.skew_s

    # --- calls ---

    def ask(self, worker: VirtualWorker, call: Callable[[], None]) -> None:
        """Have a worker's call come in, after a while, if the two can talk."""
        self.world.network.carry(worker.name, "directory", lambda: call() if self.alive else None)

    def register(self, worker: VirtualWorker) -> None:
        """As Directory.register_worker; a worker whose slot is another's ends itself."""
        if not worker.alive:
            return
        if not self.membership.register(worker.member(), worker.wish_seen, self.now_s):
            self.world.network.carry("directory", worker.name, lambda: self.world.kill(worker))
        self._check_table()

    def heartbeat(self, worker: VirtualWorker) -> None:
        """As Directory.heartbeat, and what the worker does with the answer."""
        known = self.membership.heartbeat(worker.name, 0.5, self.now_s, 1.0, 1 << 40)
        table = self._check_table()
        stamp = NO_TABLE if table is None else table.stamp
        orders: tuple[Share, Share] | None = None
        if known:
            self._expire()
            orders = self.membership.keeps(worker.name), self.membership.share_of(worker.name)
            self._nobody_needs_what_may_be_dropped(worker, orders[0])

        def heard() -> None:
            worker.wish_seen = worker.wish_seen if stamp == NO_TABLE else stamp
            if not known:
                self.ask(worker, lambda: self.register(worker))
            elif orders is not None and worker.ready:
                worker.obey(*orders, self)

        self.world.network.carry("directory", worker.name, lambda: worker.do(heard))

    def poll(self, client: str, seen: Stamp) -> PlacementTable | None:
        """As Directory.poll_table, which returns at once here."""
        self.membership.observe(seen)
        self._in_use[client], self._heard_s[client] = seen, self.now_s
        self._expire()
        table = self._check_table()
        if table is None or table.stamp == seen:
            return None
        if seen == NO_TABLE:
            self._in_use[client] = table.stamp
        return table

    # --- bookkeeping and guarantees ---

    def _expire(self) -> None:
        self.membership.expire(self.now_s)
        live = {name for name, heard_s in self._heard_s.items() if self.now_s - heard_s < _REPLICA_SILENCE_S}
        self._in_use = {name: stamp for name, stamp in self._in_use.items() if name in live}
        used = list(self._in_use.values())
        if self._all_may_not_be_heard:
            used.append(Stamp(1, 0))
        self.membership.followed(used)

    @property
    def _all_may_not_be_heard(self) -> bool:
        return self.now_s - self._started_s < _REPLICA_SILENCE_S

    def _check_table(self) -> PlacementTable | None:
        table = self.membership.table()
        if table is not None:
            known = self.world.published.setdefault(table.stamp, table.encoded)
            assert known == table.encoded, f"two tables with one stamp, {table.stamp}"
        return table

    def _nobody_needs_what_may_be_dropped(self, worker: VirtualWorker, keeps: Share) -> None:
        for client in self.world.clients:
            table = client.table
            if client.name not in self._in_use and not self._all_may_not_be_heard:
                continue
            ids = [one.worker_id for one in table.workers]
            if worker.name not in ids:
                continue
            at = ids.index(worker.name)
            for layer, experts in worker.held.items():
                holders_ER = table.holders_LER[table.layers.index(layer)] if layer in table.layers else None
                for expert in set(experts) - set(keeps.get(layer, ())):
                    listed = holders_ER is not None and expert < len(holders_ER) and at in holders_ER[expert].tolist()
                    assert not listed, f"{worker.name} may drop {layer}/{expert}, for which {client.name} asks it"
