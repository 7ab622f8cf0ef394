"""How many expert workers there are to be, by how busy they are. Pure."""

from __future__ import annotations

import math

from cluster.config import ExpertAutoscaling


class ExpertAutoscaler:
    """For the workers of one pool. Not thread-safe."""

    def __init__(self, scaling: ExpertAutoscaling) -> None:
        self._scaling = scaling
        self._direction = 0  # 1: more are wanted, -1: fewer
        self._since_s = 0.0
        self._mildest = 0  # the number nearest to the present one that was wanted since then

    def wanted(self, busy: float | None, present: int, now_s: float) -> int:
        """Return how many there are to be from now on. `busy`: how many would do all the work if they computed all the
        time, None if that is not known; `present`: how many there are to be until now.
        """
        scaling = self._scaling
        asked = present if busy is None else math.ceil(round(busy / scaling.target_busy, 6))
        asked = min(max(asked, scaling.min_workers), scaling.max_workers)
        direction = (asked > present) - (asked < present)
        if direction != self._direction:
            self._direction, self._since_s, self._mildest = direction, now_s, asked
        self._mildest = min(self._mildest, asked) if direction > 0 else max(self._mildest, asked)
        delay_s = scaling.upscale_delay_s if direction > 0 else scaling.downscale_delay_s
        if not direction or now_s - self._since_s < delay_s:
            return present
        self._direction = 0  # the next change waits as long again
        return self._mildest
