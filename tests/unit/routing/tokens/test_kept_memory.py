"""What a large frame costs a worker's memory management."""

from __future__ import annotations

from pathlib import Path

from tests.unit.routing.tokens.conftest import Cluster, rows

ROWS = 8192  # x 128 bytes: 1 MiB each way


def page_faults(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def test_frames_reuse_the_memory_of_those_before(cluster: Cluster) -> None:
    cluster.start("a", list(range(8)))
    cluster.publish("a")
    client = cluster.client()
    hidden, ids, weights, _ = rows(ROWS)
    for _ in range(20):
        client.forward(1, hidden, ids, weights)
    before = page_faults(cluster.processes["a"].pid)
    for _ in range(50):
        client.forward(1, hidden, ids, weights)
    assert (page_faults(cluster.processes["a"].pid) - before) / 50 < 50  # several hundreds otherwise
