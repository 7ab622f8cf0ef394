"""Counts which experts the router chooses: tokens per expert and layer, as an engine sees them.

Legend: L layers, E experts of a layer, T tokens, K experts per token.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np
from prometheus_client import Metric
from prometheus_client.registry import Collector

from monitoring.metrics import RoutingFamilies

Detail = Literal["top", "full"]
TOP = 8  # experts of a layer that `top` names
_MEMORY_S = 60.0  # loads and imbalance look back about so far
_NOTHING = 1e-3  # tokens per expert


class ExpertLoad(Collector):
    """Counts tokens on the dispatching thread and computes loads on the scraping one."""

    def __init__(self, num_experts: int, detail: Detail, clock: Callable[[], float]) -> None:
        self._num_experts = num_experts
        self._detail = detail
        self._clock = clock
        self._lock = threading.Lock()
        self._layers: dict[int, int] = {}  # layer -> row of the arrays
        self._total_LE = np.zeros((0, num_experts), dtype=np.int64)
        self._recent_LE = np.zeros((0, num_experts))  # decays; includes `_total` up to `_folded`
        self._folded_LE = np.zeros((0, num_experts), dtype=np.int64)
        self._folded_s = clock()

    def add(self, layer: int, expert_ids_TK: np.ndarray) -> None:
        """Count the tokens of some dispatches. Ids may have any integer dtype and shape; those of no expert are left
        out.
        """
        ids = expert_ids_TK[(expert_ids_TK >= 0) & (expert_ids_TK < self._num_experts)]
        counts_E = np.bincount(ids, minlength=self._num_experts)
        with self._lock:
            row = self._layers.get(layer)
            if row is None:
                row = self._layers[layer] = len(self._layers)
                none_1E = np.zeros((1, self._num_experts), dtype=np.int64)
                self._total_LE = np.vstack((self._total_LE, none_1E))
                self._folded_LE = np.vstack((self._folded_LE, none_1E))
                self._recent_LE = np.vstack((self._recent_LE, none_1E.astype(np.float64)))
            self._total_LE[row] += counts_E

    def describe(self) -> Iterable[Metric]:
        """Return the families, without samples."""
        return RoutingFamilies().all()

    def collect(self) -> Iterable[Metric]:
        """Return the families with their samples. Layers without a token lately have no load."""
        families = RoutingFamilies()
        with self._lock:
            self._decay()
            total_LE, recent_LE, layers = self._total_LE.copy(), self._recent_LE.copy(), dict(self._layers)
        for layer, row in sorted(layers.items()):
            name, mean = str(layer), recent_LE[row].mean()
            families.routed.add_metric([name], float(total_LE[row].sum()))
            if self._detail == "full":
                for expert, count in enumerate(total_LE[row]):
                    families.tokens.add_metric([name, str(expert)], float(count))
            if mean < _NOTHING:
                continue
            ratio_E = recent_LE[row] / mean
            families.imbalance.add_metric([name], float(ratio_E.max()))
            shown = range(self._num_experts) if self._detail == "full" else np.argsort(-ratio_E, kind="stable")[:TOP]
            for expert in shown:
                families.load.add_metric([name, str(expert)], float(ratio_E[expert]))
        return families.all()

    def _decay(self) -> None:
        now_s = self._clock()
        self._recent_LE *= math.exp((self._folded_s - now_s) / _MEMORY_S)
        self._recent_LE += self._total_LE - self._folded_LE
        np.copyto(self._folded_LE, self._total_LE)
        self._folded_s = now_s
