"""The slots of expert workers: what the worker in each is to hold, whoever that is and whether there is one now.

Slots are numbered from 0, and each belongs to a pool of workers of one kind. Pools grow and shrink while they serve,
and their slots' shares with them, as long as the workers can load and drop experts; a pool whose workers cannot is
`fixed`. Pure; no clock.

Legend: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from routing.tokens.slot_shares import with_enough, with_one_more


class WorkerSlots:
    """Not thread-safe."""

    def __init__(
        self, shares_LE: Sequence[np.ndarray], pools: Sequence[str] | None = None, fixed: Collection[str] = ()
    ) -> None:
        """`shares_LE`: bool, by slot; `pools`: by slot, all "" if not given; `fixed`: pools that stay as they are."""
        copies_LE = np.sum(shares_LE, axis=0)
        self.needed_LE: np.ndarray = copies_LE > 0
        self.replicas = int(copies_LE[self.needed_LE].min())  # of each expert, at least
        self.shares_LE = dict(enumerate(shares_LE))
        self.weights_LE: Mapping[int, np.ndarray] = {}  # by slot: part of each expert's rows; none: divided evenly
        self.first_experts = {slot: int(share_LE.sum()) for slot, share_LE in self.shares_LE.items()}
        self._pools = dict(enumerate(pools or [""] * len(shares_LE)))
        self._fixed = frozenset(fixed)
        self._wanted = dict(Counter(self._pools.values()))
        self._decided: set[int] = set()  # slots whose share is not the configured one, or was learnt from its worker

    # --- events ---

    def resize(self, wanted: Mapping[str, int]) -> None:
        """Have so many slots in these pools from now on: `add` and `give_up` see to it. Unknown and fixed pools are
        left alone.
        """
        self._wanted.update({pool: wanted[pool] for pool in (self._wanted.keys() & wanted.keys()) - self._fixed})

    def add(self, pool: str, taken: Collection[int]) -> int | None:
        """Return a new slot of a pool that is to have more, None if it has enough. Its share is taken from the others';
        its number is the lowest that is neither a slot's nor `taken`.
        """
        if self._count(pool) >= self._wanted.get(pool, 0) or self.is_fixed(pool):
            return None
        used = {*self.shares_LE, *taken}
        slot = next(number for number in range(len(used) + 1) if number not in used)
        self._pools[slot] = pool
        self._decide(with_one_more(self._changeable(), slot))
        self._even_first_experts()
        return slot

    def give_up(self, live: Collection[int], has: Mapping[int, np.ndarray]) -> None:
        """Give up slots that are too many and not `live`, and divide their experts among the others: to those that
        have them already (`has`, bool [L, E] by slot) where there are some.
        """
        for pool in self._wanted:
            empty = sorted(slot for slot in self.of(pool) if slot not in live)
            while empty and self._count(pool) > self._wanted[pool]:
                slot = empty.pop()
                del self.shares_LE[slot]
                del self._pools[slot]
                self._decided.discard(slot)
                self._decide(self._with_enough(has))
                self._even_first_experts()

    def learn(self, slot: int, pool: str, share_LE: np.ndarray) -> None:
        """Take over what a worker says of its slot, unless that is decided here: a new directory learns in this way."""
        if slot not in self._decided:
            self.shares_LE[slot] = share_LE
            self._pools[slot] = pool
            self.first_experts.setdefault(slot, self._mean_experts())
            self._decided.add(slot)

    def reshare(self, shares_LE: Mapping[int, np.ndarray], weights_LE: Mapping[int, np.ndarray]) -> None:
        """Change slots' shares (bool), and which part of an expert's rows each slot gets (float, in any unit)."""
        self._decide(shares_LE)
        self.weights_LE = weights_LE

    # --- queries ---

    def of(self, pool: str) -> list[int]:
        """Return the slots of a pool, in order."""
        return sorted(slot for slot, of in self._pools.items() if of == pool)

    def share(self, slot: int) -> np.ndarray:
        """Return what the worker in a slot is to hold, bool [L, E]: nothing in one that is given up."""
        return self.shares_LE.get(slot, np.zeros_like(self.needed_LE))

    def complete(self) -> bool:
        """Return whether each pool has just the slots that it is to have."""
        return all(self._count(pool) == count for pool, count in self._wanted.items())

    def is_fixed(self, pool: str) -> bool:
        """Return whether the slots of a pool stay as they are."""
        return pool in self._fixed

    def _count(self, pool: str) -> int:
        return sum(of == pool for of in self._pools.values())

    def _changeable(self) -> dict[int, np.ndarray]:
        return {slot: share for slot, share in self.shares_LE.items() if not self.is_fixed(self._pools[slot])}

    def _with_enough(self, has: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Return shares for the slots that may change, with what the others lack of `replicas` of each expert."""
        copies_LE = self.needed_LE * self.replicas
        for slot in self.shares_LE.keys() - self._changeable().keys():
            copies_LE -= self.shares_LE[slot]
        return with_enough(self._changeable(), copies_LE, has)

    def _decide(self, shares_LE: Mapping[int, np.ndarray]) -> None:
        for slot, share_LE in shares_LE.items():
            known_LE = self.shares_LE.get(slot)
            if known_LE is None or not np.array_equal(known_LE, share_LE):
                self.shares_LE[slot] = share_LE
                self._decided.add(slot)

    def _even_first_experts(self) -> None:
        self.first_experts = dict.fromkeys(self.shares_LE, self._mean_experts())

    def _mean_experts(self) -> int:
        return int(sum(share_LE.sum() for share_LE in self.shares_LE.values())) // len(self.shares_LE)
