"""How many tokens each expert had lately, over all attention replicas. Pure: the time comes in with each event.

Legend: L layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

from routing.tokens.routed_tokens import RoutedTokens


class RecentTokens:
    """Counts that halve in about 0.7 `memory_s` seconds."""

    def __init__(self, layers: Sequence[int], num_experts: int, memory_s: float) -> None:
        self._layers = {layer: at for at, layer in enumerate(layers)}
        self._memory_s = memory_s
        self._recent_LE = np.zeros((len(layers), num_experts))
        self._as_of_s = -math.inf
        self._said: dict[str, np.ndarray] = {}  # by replica: its totals, int64 [L, E]

    def report(self, replica_id: str, total: RoutedTokens, now_s: float) -> None:
        """Take in a replica's counts since its start. Its first report only says where it stands: what it counted
        before may be long ago. Layers and experts that the model does not have are left out.
        """
        total_LE = np.zeros(self._recent_LE.shape, dtype=np.int64)
        experts = min(total_LE.shape[1], total.tokens_LE.shape[1])
        for layer, tokens_E in zip(total.layers, total.tokens_LE, strict=True):
            if layer in self._layers:
                total_LE[self._layers[layer], :experts] = tokens_E[:experts]
        new_LE = total_LE - self._said.get(replica_id, total_LE)
        self._said[replica_id] = total_LE
        self._recent_LE = self.at(now_s) + np.maximum(new_LE, 0)
        self._as_of_s = now_s

    def keep_only(self, replica_ids: Collection[str]) -> None:
        """Forget what all other replicas said."""
        self._said = {name: total_LE for name, total_LE in self._said.items() if name in replica_ids}

    def at(self, now_s: float) -> np.ndarray:
        """Return the recent tokens, float64 [L, E]."""
        return self._recent_LE * math.exp((self._as_of_s - now_s) / self._memory_s)
