"""What admission's own work costs on the loop that carries the streams: its tick, a submission, a replica's new load.

    python -m benchmarks.admission_tick [--json]

The worst realistic state: every slot of every replica taken, 512 requests of 100 tenants waiting, each with a prompt of
its own. Milliseconds per call, median and 99th percentile.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count

from benchmarks.overload.report import quantile
from cluster.config import AdmissionConfig, ClassObjective
from routing.requests.admission import Admission
from routing.requests.quota import Quotas
from routing.requests.replica_choice import ReplicaChoice
from routing.requests.request import Ask, Priority, ReplicaLoad, Tenant

WAITING, SLOTS, TENANTS = 512, 64, 100
REPLICAS = (4, 16, 64)
_PATIENT = ClassObjective(ttft_s=10_000.0, tpot_s=10.0)  # nobody is refused: the queue stays as long as it is
_CALLS = 200


class Full:
    """An admission in that state."""

    def __init__(self, replicas: int) -> None:
        self._rng = random.Random(1)
        self._numbers = count()
        self._tenants = [Tenant(f"t{number}", weight=self._rng.choice([1.0, 2.0])) for number in range(TENANTS)]
        self.loads = [ReplicaLoad(f"r{number}", SLOTS, 1_000_000) for number in range(replicas)]
        config = AdmissionConfig(system=_PATIENT, interactive=_PATIENT, batch=_PATIENT, max_waiting=WAITING)
        self.admission = Admission(config, ReplicaChoice(), random.Random(2), Quotas())
        self.now_s = 0.0
        self.admission.set_loads(self.loads, self.now_s)
        running = [self.ask() for _ in range(replicas * SLOTS)]
        for one in running:
            self.admission.submit(one, self.now_s)
            self.admission.progress(one.ticket, 1, self.now_s)
        for steps in (10, 20, 30):
            self.now_s += 0.2
            for one in running:
                self.admission.progress(one.ticket, steps, self.now_s)
        while self.admission.waiting() < WAITING:
            self.admission.submit(self.ask(), self.now_s)

    def ask(self) -> Ask:
        """One more request."""
        rng = self._rng
        hashes = tuple(rng.getrandbits(60) for _ in range(20))
        ticket, tenant, new_tokens = str(next(self._numbers)), rng.choice(self._tenants), rng.randint(50, 2_000)
        return Ask(ticket, tenant, Priority.INTERACTIVE, 1_000, new_tokens, 1, hashes, None)

    def tick(self) -> None:
        """As every 50 ms."""
        self.admission.tick(self.now_s)

    def set_loads(self) -> None:
        """One replica says something new."""
        at = self._rng.randrange(len(self.loads))
        self.loads[at] = replace(self.loads[at], running=self._rng.randint(0, SLOTS))
        self.admission.set_loads(self.loads, self.now_s)


def measured(call: Callable[[], object], full: Full, pause_s: float, calls: int = _CALLS) -> dict[str, float]:
    """Milliseconds per call, at calls that come `pause_s` apart."""
    took_ms = []
    for _ in range(calls):
        full.now_s += pause_s
        begun_s = time.perf_counter()
        call()
        took_ms.append((time.perf_counter() - begun_s) * 1e3)
    return {"p50_ms": round(quantile(took_ms, 0.5), 3), "p99_ms": round(quantile(took_ms, 0.99), 3)}


def row(replicas: int) -> dict[str, dict[str, float]]:
    """All of it with so many replicas."""
    full = Full(replicas)
    asks = iter([full.ask() for _ in range(_CALLS)])
    found = {"tick": measured(full.tick, full, 0.05), "set_loads": measured(full.set_loads, full, 0.004)}
    found["submit"] = measured(lambda: full.admission.submit(next(asks), full.now_s), full, 0.001)
    assert full.admission.waiting() == WAITING
    return found


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="for machines")
    args = parser.parse_args()
    rows = {replicas: row(replicas) for replicas in REPLICAS}
    if args.json:
        print(json.dumps({"waiting": WAITING, "replicas": rows}))
        return
    for replicas, found in rows.items():
        calls = ", ".join(f"{name} {ms['p50_ms']:.2f} (p99 {ms['p99_ms']:.2f})" for name, ms in found.items())
        print(f"{WAITING} waiting, {replicas} x {SLOTS} slots, ms: {calls}")


if __name__ == "__main__":
    main()
