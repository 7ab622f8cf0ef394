"""What the parts of one admission share."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.config import ClassObjective
from routing.requests.admission.replicas import Replicas
from routing.requests.fair_queue import FairQueue
from routing.requests.prediction.pace import Pace
from routing.requests.quota import Quotas
from routing.requests.request import Priority


@dataclass(frozen=True)
class Shared:
    """What is promised, what waits and runs, and what was learned. Each part of admission has this one object."""

    objectives: Mapping[Priority, ClassObjective]
    quotas: Quotas
    queues: Mapping[Priority, FairQueue]
    replicas: Replicas
    pace: Pace
    rng: random.Random
