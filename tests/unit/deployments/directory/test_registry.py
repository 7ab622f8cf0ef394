"""Attention replicas and gateways, registered and forgotten, with an injected clock and without Ray."""

from __future__ import annotations

from deployments.directory.members import AdmissionEndpoint, AttentionMember, GatewayMember
from deployments.directory.registry import Registry
from monitoring.discovery import ScrapeTarget


def replica(name: str, state: str = "ready") -> AttentionMember:
    return AttentionMember(name, 1, "n", state, f"http://{name}", "token", (ScrapeTarget("attention", name, "n"),))


def gateway(name: str) -> GatewayMember:
    return GatewayMember(name, 1, "n", 0, {}, False, ScrapeTarget("gateway", name, "n"))


def test_members_are_forgotten_when_they_fall_silent() -> None:
    registry = Registry(silence_s=6.0, first_version=10)
    registry.register_replica(replica("a"), 0.0)
    registry.register_replica(replica("b"), 3.0)
    registry.register_gateway(gateway("g"), 0.0)
    registry.expire(5.9)
    assert ([m.replica_id for m in registry.replicas()], len(registry.gateways())) == (["a", "b"], 1)
    registry.expire(6.0)
    assert ([m.replica_id for m in registry.replicas()], len(registry.gateways())) == (["b"], 0)


def test_the_version_grows_with_each_change_and_with_nothing_else() -> None:
    registry = Registry(silence_s=6.0, first_version=10)
    assert (registry.update_view([]), registry.view.version) == (False, 10)
    registry.register_replica(replica("a", "starting"), 0.0)
    assert (registry.update_view([]), registry.view.version, registry.view.endpoints) == (True, 11, ())  # its target
    registry.register_replica(replica("a"), 0.0)
    assert (registry.update_view([]), registry.view.version) == (True, 12)
    assert [endpoint.replica_id for endpoint in registry.view.endpoints] == ["a"]
    registry.register_replica(replica("a"), 1.0)  # it polls again
    assert (registry.update_view([]), registry.view.version) == (False, 12)
    registry.expire(99.0)
    assert (registry.update_view([]), registry.view.version, registry.view.endpoints) == (True, 13, ())


def test_the_common_admission_is_known_until_its_successor_registers() -> None:
    registry = Registry(silence_s=6.0, first_version=0)
    for address in ("n:1", "n:2"):
        target = ScrapeTarget("admission", address, "n")
        registry.register_admission(AdmissionEndpoint(address, "token"), target, 0.0, 0.0)
        registry.expire(99.0)
        assert registry.update_view([])
        assert registry.view.admission is not None
        assert registry.view.admission.address == address
        assert [target.address for target in registry.view.targets] == [address]
