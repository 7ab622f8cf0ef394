"""The models that clients see."""

from __future__ import annotations

import pytest

from cluster.errors import ModelNotFound
from deployments.gateway.models import ModelPages
from routing.requests.request import ReplicaLoad, Tenant


def load(replica_id: str, max_model_len: int) -> ReplicaLoad:
    return ReplicaLoad(replica_id, max_num_seqs=4, kv_cache_tokens=100, max_model_len=max_model_len)


def test_every_name_is_the_same_model() -> None:
    loads: list[ReplicaLoad] = []
    pages = ModelPages(("org/big", "small"), 7, lambda: loads)
    assert [model["max_model_len"] for model in pages.visible(Tenant("t"))] == [None, None]
    loads += [load("a", 100), load("b", 200), load("c", 0)]  # replicas of two versions, and one that has not said
    big, small = pages.visible(Tenant("t"))
    assert (big["id"], small["id"]) == ("org/big", "small")
    assert {**big, "id": ""} == {**small, "id": ""}
    assert (big["created"], big["owned_by"], big["root"], big["max_model_len"]) == (7, "deepsplit", "org/big", 200)
    assert [pages.retrieve(Tenant("t"), name) for name in ("org/big", "small")] == [big, small]


@pytest.mark.parametrize("name", ["", "org", "big", "ORG/BIG", "org/big/", "/org/big", "../org/big"])
def test_no_other_name_is_found(name: str) -> None:
    with pytest.raises(ModelNotFound, match="this server has 'org/big'"):
        ModelPages(("org/big", "small"), 7, list).retrieve(Tenant("t"), name)


@pytest.mark.parametrize(("models", "seen"), [(("small",), 2), (("org/big", "x"), 2), (("x",), 0), ((), 0), (None, 2)])
def test_a_tenant_that_may_use_one_name_may_use_all(models: tuple[str, ...] | None, seen: int) -> None:
    pages = ModelPages(("org/big", "small"), 7, list)
    tenant = Tenant("t", models=models)
    assert len(pages.visible(tenant)) == seen
    if not seen:
        with pytest.raises(ModelNotFound):
            pages.retrieve(tenant, "small")
