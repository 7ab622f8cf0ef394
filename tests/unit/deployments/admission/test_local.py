"""Deciding in this process, for all or for one of several gateways."""

from __future__ import annotations

import pytest

from cluster.config import AdmissionConfig, ClassObjective
from deployments.admission.local import LocalAdmission
from deployments.admission.messages import Finish, Submit
from routing.requests.admission import Admitted, Decision
from routing.requests.quota import Quotas
from routing.requests.request import Ask, Priority, ReplicaLoad, Tenant, Usage

CONFIG = AdmissionConfig(batch=ClassObjective(ttft_s=10_000.0, tpot_s=10.0))
LOADS = [ReplicaLoad("r", 8, 10_000), ReplicaLoad("s", 8, 10_000)]


TENANT = Tenant("t")


def ask(ticket: str, tenant: Tenant = TENANT) -> Ask:
    return Ask(ticket, tenant, Priority.BATCH, 10, 20, 1, (), None)


class Gateway:
    """One that decides alone over its part."""

    def __init__(self, fraction: float, quotas: Quotas | None = None) -> None:
        self.heard: list[Decision] = []
        self.admission = LocalAdmission(CONFIG, lambda: 0.0, self.heard.append, quotas or Quotas(), fraction)
        self.admission.set_loads(LOADS)

    def granted(self) -> list[str]:
        return [one.grant.ticket for one in self.heard if isinstance(one, Admitted)]


def test_gateways_that_decide_alone_fill_the_replicas_together_and_what_they_ask_for_adds_up() -> None:
    gateways = [Gateway(0.5), Gateway(0.5)]
    for number in range(12):
        for gateway in gateways:
            gateway.admission.tell(Submit(ask(f"{number}")))
    assert [len(gateway.granted()) for gateway in gateways] == [8, 8]
    assert sum(gateway.admission.demand().in_replicas for gateway in gateways) == pytest.approx(24 / 8)


def test_one_that_decides_again_knows_what_was_spent_before() -> None:
    tenant, quotas = Tenant("t", tokens_per_minute=100), Quotas()
    first = Gateway(0.5, quotas)
    first.admission.tell(Submit(ask("a", tenant)))
    first.admission.tell(Finish("a", Usage(10, 30)))
    again = Gateway(0.5, quotas)
    again.admission.tell(Submit(ask("b", tenant)))
    assert again.granted() == []
    whole = Gateway(1.0, quotas)
    whole.admission.tell(Submit(ask("c", tenant)))
    assert whole.granted() == ["c"]


def test_loads_that_did_not_change_are_the_same_again() -> None:
    gateway = Gateway(0.5)
    before = [state.load for state in gateway.admission._admission._replicas.live]
    gateway.admission.set_loads(LOADS)
    assert [state.load for state in gateway.admission._admission._replicas.live] == before
    assert [load.max_num_seqs for load in before] == [4, 4]
