"""Finds the scrape targets of Ray's own node agents."""

from __future__ import annotations

import threading
from typing import Any

import ray

from cluster.addresses import bracketed
from monitoring.discovery import ScrapeTarget

_REFRESH_S = 5.0


class RayAgents:
    """Asks Ray for its nodes on a thread of its own, because that blocks."""

    def __init__(self) -> None:
        self.targets: tuple[ScrapeTarget, ...] = ()  # one per live node, as of Ray's last answer
        self._asked_s = float("-inf")
        self._asking: threading.Thread | None = None

    def refresh(self, now_s: float) -> None:
        """Ask Ray again if it was last asked more than _REFRESH_S ago. Does not wait for the answer."""
        busy = self._asking is not None and self._asking.is_alive()
        if ray.is_initialized() and now_s - self._asked_s > _REFRESH_S and not busy:
            self._asked_s = now_s
            self._asking = threading.Thread(target=self._ask, name="ray-agents", daemon=True)
            self._asking.start()

    def _ask(self) -> None:
        nodes: list[dict[str, Any]] = ray.nodes()
        self.targets = tuple(
            ScrapeTarget("ray", f"{bracketed(node['NodeManagerAddress'])}:{node['MetricsExportPort']}",
                         node["NodeManagerAddress"])
            for node in nodes
            if node["Alive"] and node["MetricsExportPort"]
        )  # fmt: skip
