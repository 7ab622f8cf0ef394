"""The attention replicas and gateways that registered with the directory, and the view of them that gateways get.

Plain bookkeeping without Ray: the time comes in with each event. Expert workers are `routing.tokens.membership`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from deployments.directory.members import (
    AdmissionEndpoint,
    AttentionMember,
    ClusterView,
    GatewayMember,
    ReplicaEndpoint,
)
from monitoring.discovery import ScrapeTarget


class Registry:
    """Members that have not registered for `silence_s` seconds are forgotten. Not thread-safe."""

    def __init__(self, silence_s: float, first_version: int) -> None:
        """`first_version`: of the view, above those of every earlier directory."""
        self._silence_s = silence_s
        self._attention: dict[str, tuple[AttentionMember, float]] = {}  # with the time of the last registration
        self._gateways: dict[str, tuple[GatewayMember, float]] = {}
        self._admission: tuple[AdmissionEndpoint, ScrapeTarget] | None = None
        self._admission_demand = 0.0  # in attention replicas
        self._admission_heard_s = 0.0
        self._draining = False  # the whole application is about to stop
        self._going: set[str] = set()  # nodes that are about to go
        self._leaving: set[str] = set()  # those of them that take nothing new any more
        self.view = ClusterView(first_version, (), None, False)  # as of the last `update_view`

    # --- events ---

    def register_replica(self, member: AttentionMember, now_s: float) -> None:
        """Record what an attention replica says of itself."""
        self._attention[member.replica_id] = (member, now_s)

    def register_gateway(self, member: GatewayMember, now_s: float) -> None:
        """Record what a gateway says of itself."""
        self._gateways[member.gateway_id] = (member, now_s)

    def register_admission(
        self, endpoint: AdmissionEndpoint, scrape: ScrapeTarget, demand: float, now_s: float
    ) -> None:
        """Record where the common admission listens, which stays until a successor registers, and how many attention
        replicas the requests at it would fill, which counts until it falls silent.
        """
        self._admission = (endpoint, scrape)
        self._admission_demand, self._admission_heard_s = demand, now_s

    def drain(self) -> None:
        """Record that the application is about to stop."""
        self._draining = True

    def leave_node(self, node: str, settled: bool) -> None:
        """Record that `node` is about to go, and, once `settled`, that it takes nothing new any more."""
        self._going.add(node)
        if settled:
            self._leaving.add(node)

    def expire(self, now_s: float) -> None:
        """Forget members that fell silent. To be called before a query."""
        since_s = now_s - self._silence_s
        if self._admission_heard_s <= since_s:
            self._admission_demand = 0.0
        self._attention = {key: one for key, one in self._attention.items() if one[1] > since_s}
        self._gateways = {key: one for key, one in self._gateways.items() if one[1] > since_s}

    def update_view(self, other_targets: Iterable[ScrapeTarget]) -> bool:
        """Bring `view` up to date; returns whether it changed. `other_targets`: scrape targets of all processes that do
        not register here.
        """
        replicas = self.replicas()
        endpoints = tuple(
            ReplicaEndpoint(m.replica_id, m.url, m.token, m.pid, m.node, m.node in self._leaving)
            for m in replicas
            if m.state == "ready"
        )
        targets = [*other_targets, *(m.scrape for m in self.gateways()), *(t for m in replicas for t in m.scrape)]
        admission = None
        if self._admission is not None:
            admission, target = self._admission
            targets.append(target)
        view = ClusterView(self.view.version, endpoints, admission, self._draining, tuple(targets))
        if view == self.view:
            return False
        self.view = replace(view, version=view.version + 1)
        return True

    # --- queries ---

    def replicas(self) -> list[AttentionMember]:
        """All attention replicas."""
        return [member for member, _ in self._attention.values()]

    def gateways(self) -> list[GatewayMember]:
        """All gateways."""
        return [member for member, _ in self._gateways.values()]

    @property
    def draining(self) -> bool:
        """Whether the application is about to stop."""
        return self._draining

    def demand(self) -> float | None:
        """Attention replicas that all requests would fill: those at gateways that decide alone, and those at the common
        admission. None while no gateway is known.
        """
        return self._admission_demand + sum(m.demand for m in self.gateways()) if self._gateways else None

    def drains(self, gateway: GatewayMember) -> bool:
        """Whether this gateway is to refuse new requests."""
        return self._draining or gateway.node in self._leaving

    def open_requests(self) -> int:
        """Requests that keep the application from stopping."""
        return _still_open(self.gateways())

    def requests_that_need(self, node: str) -> int:
        """Requests that keep `node` from going. A node with neither gateways nor attention replicas is needed as long
        as a gateway that is going too has requests: the whole cluster may be going.
        """
        gateways = self.gateways()
        here = [member for member in gateways if member.node == node]
        if here:
            return _still_open(here)
        replicas = [member.replica_id for member in self.replicas() if member.node == node]
        if replicas:
            return sum(member.in_flight.get(replica_id, 0) for member in gateways for replica_id in replicas)
        return _still_open([member for member in gateways if member.node in self._going])


def _still_open(gateways: Sequence[GatewayMember]) -> int:
    """Requests of gateways that are to drain. One that does not know of it yet may still take some, so it counts."""
    return sum(m.open_requests if m.draining else max(1, m.open_requests) for m in gateways)
