"""The moves from one placement to a better one.

Legend: L layers, E experts of a layer, R the most replicas of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from routing.tokens.balancing.records import Placement, Score
from routing.tokens.balancing.slots import Slots


@dataclass(frozen=True)
class Move:
    """Load `expert` of `layer` on `worker`. `replaces` is a redundant replica of the same layer that this worker drops
    first because it has no room; None where it has.
    """

    layer: int
    expert: int
    worker: int
    replaces: int | None
    nbytes: int
    gain_s: float  # seconds of the score that it wins; below 0 only where it mends
    mends: bool  # brings the expert nearer to the floor


@dataclass(frozen=True, eq=False)
class Plan:
    """Moves from one placement to a better one.

    Those that mend come first, experts without any replica before all others. The rest goes by gain per byte, the moves
    of one layer in an order that each can build upon. Wherever one stops, no worker holds more than its capacity, no
    expert is below a floor that it had reached, and the score is no worse than before the last move.
    """

    before: Score  # holders and weights as they are
    redivided: Score  # the same holders with the best weights: what is won without loading anything
    after: Score
    moves: tuple[Move, ...]
    worth_it: bool
    start: Placement  # the same holders with the best weights
    stages: Mapping[tuple[int, int], Slots]  # (layer, n): that layer after its n-th move, n from 1

    @property
    def nbytes(self) -> int:
        """Bytes that the moves load."""
        return sum(move.nbytes for move in self.moves)

    @property
    def target(self) -> Placement:
        """The placement after all moves."""
        return self.placement_after(len(self.moves))

    def placement_after(self, count: int) -> Placement:
        """The placement after the first `count` moves, with its weights."""
        workers_LER, weights_LER = self.start.workers_LER.copy(), self.start.weights_LER.copy()
        done: dict[int, int] = {}
        for move in self.moves[:count]:
            done[move.layer] = done.get(move.layer, 0) + 1
        for layer, last in done.items():
            stage = self.stages[layer, last].placement()
            workers_LER[layer], weights_LER[layer] = stage.workers_LER[0], stage.weights_LER[0]
        return Placement(workers_LER, weights_LER)
