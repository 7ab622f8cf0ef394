"""Where Ray's own node agents have their metrics."""

from __future__ import annotations

import threading
from typing import Any

import ray

from monitoring.discovery import ScrapeTarget

_REFRESH_S = 5.0


class RayAgents:
    """Asks Ray on a thread of its own, because that blocks: `targets` answers at once with what is known."""

    def __init__(self) -> None:
        self._targets: tuple[ScrapeTarget, ...] = ()
        self._asked_s = float("-inf")
        self._asking: threading.Thread | None = None

    def targets(self, now_s: float) -> tuple[ScrapeTarget, ...]:
        """One per live node; at most _REFRESH_S and one question old."""
        busy = self._asking is not None and self._asking.is_alive()
        if ray.is_initialized() and now_s - self._asked_s > _REFRESH_S and not busy:
            self._asked_s = now_s
            self._asking = threading.Thread(target=self._ask, name="ray-agents", daemon=True)
            self._asking.start()
        return self._targets

    def _ask(self) -> None:
        nodes: list[dict[str, Any]] = ray.nodes()
        self._targets = tuple(
            ScrapeTarget("ray", f"{_host(node['NodeManagerAddress'])}:{node['MetricsExportPort']}",
                         node["NodeManagerAddress"])
            for node in nodes
            if node["Alive"] and node["MetricsExportPort"]
        )  # fmt: skip


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
