"""What admission decides and reports. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.errors import Plane, Refusal
from routing.requests.request import Grant


@dataclass(frozen=True)
class Admitted:
    """Leave to run."""

    grant: Grant


@dataclass(frozen=True)
class Refused:
    """The ticket is gone."""

    ticket: str
    refusal: Refusal


Decision = Admitted | Refused


@dataclass(frozen=True)
class Wait:
    """The predicted time until a request is placed."""

    seconds: float
    plane: Plane  # what it waits for


@dataclass(frozen=True)
class Demand:
    """What clients ask for, and what a replica can do of it."""

    sequences: float  # admitted, waiting, and what those refused lately would be running now
    per_replica: float  # sequences that one runs at the promised step time; the mean of the live ones

    @property
    def in_replicas(self) -> float:
        """The number of replicas that would be full with it. What several gateways say adds up."""
        return self.sequences / max(1.0, self.per_replica)
