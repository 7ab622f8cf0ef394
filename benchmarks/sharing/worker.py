"""A worker process with real experts, which says on request what it has computed since the last one.

Usage: python -m benchmarks.sharing.worker CONFIG_JSON EXPERTS_JSON. A line on stdin asks; a line of JSON answers.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as the deployment does; read when torch is loaded

from prometheus_client import CollectorRegistry

from cluster.config import Config
from deployments.experts.host import ExpertHost
from monitoring.expert_meter import BatchSample, ExpertMeter
from monitoring.metrics import ExpertMetrics


@dataclass
class Computed:
    """Sums over the batches of one worker."""

    batches: int = 0
    rows: int = 0
    requests: int = 0
    queue_s: float = 0.0
    compute_s: float = 0.0
    gemms: int = 0
    gemm_rows: int = 0


class _Counting(ExpertMeter):
    def __init__(self) -> None:
        super().__init__(ExpertMetrics(CollectorRegistry()))
        self.computed = Computed()

    def batch(self, sample: BatchSample) -> None:
        self.computed.batches += 1
        self.computed.rows += sample.rows
        self.computed.requests += len(sample.queue_s)
        self.computed.queue_s += sum(sample.queue_s)
        self.computed.compute_s += sample.compute_s

    def gemms(self, rows_N: list[int]) -> None:
        self.computed.gemms += sum(rows > 0 for rows in rows_N)
        self.computed.gemm_rows += sum(rows_N)


def main() -> None:
    """Serve until stdin ends."""
    config = Config.model_validate_json(sys.argv[1])
    meter = _Counting()
    host = ExpertHost(config, {int(layer): tuple(ids) for layer, ids in json.loads(sys.argv[2]).items()}, meter)
    print(host.start("127.0.0.1"), flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(meter.computed)), flush=True)
        meter.computed = Computed()
    host.stop(0)


if __name__ == "__main__":
    main()
