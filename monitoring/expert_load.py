"""Metrics of which experts the router chooses, as an engine sees them. Legend: L layers, E experts of a layer."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Sequence
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
    """Reads the counts and computes loads, on the scraping thread."""

    def __init__(
        self, totals: Callable[[], tuple[Sequence[int], np.ndarray]], detail: Detail, clock: Callable[[], float]
    ) -> None:
        """`totals`: the layers, and the tokens of their experts since the process started, int64 [L, E]."""
        self._totals = totals
        self._detail = detail
        self._clock = clock
        self._lock = threading.Lock()
        # [E] by layer: all tokens up to the last scrape, and those of lately.
        self._folded: dict[int, np.ndarray] = {}
        self._recent: dict[int, np.ndarray] = {}
        self._folded_s = clock()

    def describe(self) -> Iterable[Metric]:
        """Return the families, without samples."""
        return RoutingFamilies().all()

    def collect(self) -> Iterable[Metric]:
        """Return the families with their samples. Layers without a token lately have no load."""
        families = RoutingFamilies()
        with self._lock:
            layers, total_LE = self._totals()
            recent = self._decayed(layers, total_LE)
        for layer, total_E in zip(layers, total_LE, strict=True):
            name, mean = str(layer), recent[layer].mean()
            families.routed.add_metric([name], float(total_E.sum()))
            if self._detail == "full":
                for expert, count in enumerate(total_E):
                    families.tokens.add_metric([name, str(expert)], float(count))
            if mean < _NOTHING:
                continue
            ratio_E = recent[layer] / mean
            families.imbalance.add_metric([name], float(ratio_E.max()))
            shown = range(len(ratio_E)) if self._detail == "full" else np.argsort(-ratio_E, kind="stable")[:TOP]
            for expert in shown:
                families.load.add_metric([name, str(expert)], float(ratio_E[expert]))
        return families.all()

    def _decayed(self, layers: Sequence[int], total_LE: np.ndarray) -> dict[int, np.ndarray]:
        now_s = self._clock()
        kept = math.exp((self._folded_s - now_s) / _MEMORY_S)
        for layer, total_E in zip(layers, total_LE, strict=True):
            new_E = total_E - self._folded.get(layer, 0)
            self._recent[layer] = kept * self._recent.get(layer, 0) + new_E
            self._folded[layer] = total_E
        self._folded_s = now_s
        return self._recent
