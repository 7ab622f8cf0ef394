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
    """What clients ask for, and what there is for it."""

    sequences: float  # admitted, waiting, and what those refused lately would be running now
    limit: float  # sequences that all live replicas run at the promised step time
    replicas: int  # live ones

    @property
    def in_replicas(self) -> float:
        """The number of replicas that would be full with it."""
        return self.sequences * self.replicas / self.limit if self.limit > 0 else float(self.replicas)
