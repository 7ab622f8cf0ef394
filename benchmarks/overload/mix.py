"""Who asks for what in `benchmarks.overload`: four tenants, three classes; and what the fakes can do."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.fakes.service_model import ServiceModel
from benchmarks.overload.load import Arrival
from cluster.config import AdmissionConfig, ClassObjective
from cluster.keys.api_keys import key_hash, new_key

# Four replicas of eight slots that step in 25 ms + 1.25 ms per sequence and prefill 4,000 tokens/s: some 700 tokens/s
# and 18 requests/s together. Ten times that is about 180 requests/s, most of them refused: gateway, fakes and
# generator together stay below one core.
SERVICE = ServiceModel(slots=8, kv_cache_tokens=16_384, base_s=0.025, sequence_s=0.00125, prefill_tokens_per_s=4_000)
REPLICAS = 4
EOS_EVERY = 200  # one token in so many ends its sequence: some completions are shorter than their bound
MODEL = "fake"

CLASSES = ("system", "interactive", "batch")
OBJECTIVES = AdmissionConfig(
    system=ClassObjective(ttft_s=1.0, tpot_s=0.15),
    interactive=ClassObjective(ttft_s=2.0, tpot_s=0.15),
    batch=ClassObjective(ttft_s=8.0, tpot_s=0.3),
)


@dataclass(frozen=True)
class TenantMix:
    """One tenant's part of the load."""

    name: str
    weight: float
    fraction: float  # of all requests
    classes: tuple[float, float, float]  # fractions of system, interactive and batch among its own


# `loud` and `quiet` weigh the same, and `loud` asks for twice as much.
TENANTS = (
    TenantMix("loud", 1.0, 0.40, (0.0, 0.6, 0.4)),
    TenantMix("quiet", 1.0, 0.20, (0.0, 0.6, 0.4)),
    TenantMix("heavy", 2.0, 0.30, (0.0, 0.6, 0.4)),
    TenantMix("ops", 1.0, 0.10, (0.2, 0.4, 0.4)),
)
EQUAL = ("loud", "quiet")


class Mix:
    """An endless, reproducible stream of requests."""

    def __init__(self, seed: int, model: str = MODEL, prompt_words: tuple[int, int] = (80, 240)) -> None:
        self._random = random.Random(seed)
        self._model = model
        self._prompt_words = prompt_words
        self._keys = {tenant.name: new_key() for tenant in TENANTS}

    def keys_file(self) -> str:
        """The tenants as the gateway reads them."""
        entries = [
            f"  - name: {tenant.name}\n    weight: {tenant.weight}\n    classes: [system, interactive, batch]\n"
            f"    keys: ['{key_hash(self._keys[tenant.name])}']\n"
            for tenant in TENANTS
        ]
        return "tenants:\n" + "".join(entries)

    def arrival(self, due_s: float) -> Arrival:
        """The next request."""
        rng = self._random
        tenant = rng.choices(TENANTS, [tenant.fraction for tenant in TENANTS])[0]
        priority = rng.choices(CLASSES, tenant.classes)[0]
        # Half of each tenant's requests begin alike.
        prefix = f"{tenant.name} " * 80 if rng.random() < 0.5 else ""
        words = " ".join(f"{rng.getrandbits(16):04x}" for _ in range(rng.randint(*self._prompt_words)))
        fields = {
            "model": self._model, "prompt": prefix + words, "max_tokens": rng.randint(16, 64), "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        headers = {"authorization": f"Bearer {self._keys[tenant.name]}", "x-deepsplit-priority": priority}
        return Arrival(due_s, tenant.name, priority, "/v1/completions", json.dumps(fields).encode(), headers)

    def poisson(self, per_s: float, seconds: float) -> list[Arrival]:
        """Arrivals of one load."""
        found, due_s = [], self._random.expovariate(per_s)
        while due_s < seconds:
            found.append(self.arrival(due_s))
            due_s += self._random.expovariate(per_s)
        return found

    def endless(self) -> Iterator[Arrival]:
        """Requests for a closed loop."""
        while True:
            yield self.arrival(0.0)
