"""Expert pools: checked, and each slot's device, threads and nodes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import Config, ExpertAutoscaling, ExpertsConfig
from cluster.model.spec import load_model_spec
from cluster.plan.local_node import node_resources
from cluster.plan.nodes import NodeSpec
from cluster.plan.plan import make_plan
from cluster.plan.pools import expert_pools

GPU = {"name": "gpu", "workers": 1, "device": "cuda", "placement": {"resources": {"gpu_host": 1}}}
CPU = {"name": "cpu", "workers": 2, "threads": 8, "placement": {"resources": {"cpu_host": 1}}}


def experts(**values: Any) -> ExpertsConfig:
    return ExpertsConfig.model_validate(values)


def test_without_pools_all_workers_are_one() -> None:
    section = experts(workers=3, device="cuda", threads=2)
    (only,) = expert_pools(section)
    assert (only.name, only.slots, only.experts) == ("", range(3), section)


def test_each_pool_has_its_slots_in_order() -> None:
    gpu, cpu = expert_pools(experts(workers=3, shares=[4, 1, 1], replicas_per_expert=2, pools=[GPU, CPU]))
    assert (gpu.name, gpu.slots, gpu.experts.device) == ("gpu", range(1), "cuda")
    assert (cpu.name, cpu.slots, cpu.experts.device, cpu.experts.threads) == ("cpu", range(1, 3), "cpu", 8)
    assert gpu.experts.placement.resources == {"gpu_host": 1}
    assert gpu.experts.worker_shares() == (4, 1, 1)  # what all of them share stays
    assert ExpertsConfig.model_validate_json(cpu.experts.model_dump_json()) == cpu.experts


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": 4, "pools": [GPU, CPU]}, "have 3 workers, but experts.workers is 4"),
        ({"workers": 2, "pools": [GPU, GPU]}, "two have the same name"),
        ({"workers": 3, "device": "cuda", "pools": [GPU, CPU]}, "is set per pool where there are pools"),
        ({"workers": 3, "placement": {"labels": {"a": "b"}}, "pools": [GPU, CPU]}, "move it into experts.pools"),
        ({"workers": 1, "pools": [GPU | {"name": "No"}]}, "should match pattern"),
    ],
)
def test_pools_that_do_not_fit_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        experts(**values)


def test_the_plan_puts_each_worker_on_its_pools_nodes(demo_model: Any) -> None:
    config = Config.model_validate(
        {"model": {"path": demo_model}, "experts": {"workers": 3, "shares": [2, 1, 1], "pools": [GPU, CPU]}}
    )
    cpu_host: dict[str, Any] = {"memory_gib": 16, "resources": {"cpu_host": 1}}
    nodes = [
        {"name": "any", "memory_gib": 64},
        {"name": "gpu", "memory_gib": 16, "gpus": 1, "gpu_memory_gib": 16, "resources": {"gpu_host": 1}},
        cpu_host | {"name": "cpu-0"},
        cpu_host | {"name": "cpu-1"},
    ]
    plan = make_plan(config, load_model_spec(demo_model), [NodeSpec.model_validate(node) for node in nodes])
    plan.check()
    workers = [need for need in plan.processes if need.role == "experts"]
    assert [need.gpus for need in workers] == [1, 0, 0]
    assert workers[0].node == "gpu"
    assert {need.node for need in workers[1:]} == {"cpu-0", "cpu-1"}


def test_a_local_node_offers_what_every_pool_asks_for(demo_model: Any) -> None:
    pools = [CPU, GPU | {"device": "cpu"}]
    config = Config.model_validate({"model": {"path": demo_model}, "experts": {"workers": 3, "pools": pools}})
    offered = node_resources(config)
    assert (offered["cpu_host"], offered["gpu_host"]) == (4, 2)
    assert offered["CPU"] >= 2 * 8 + 1


LOAD: dict[str, Any] = {"autoscaling": {"max_workers": 8}}


def test_pools_have_their_own_autoscaling_and_only_elastic_ones_may() -> None:
    gpu, cpu = expert_pools(experts(workers=3, pools=[GPU, CPU | LOAD]))
    assert (gpu.elastic, cpu.elastic) == (False, True)
    assert gpu.autoscaling is None
    assert cpu.autoscaling == ExpertAutoscaling(max_workers=8)
    assert not expert_pools(experts(take_over=False))[0].elastic


@pytest.mark.parametrize(("section", "said"), [
    ({"workers": 3, "pools": [GPU | LOAD, CPU]}, "those on GPUs do not"),
    ({"device": "cuda"} | LOAD, "those on GPUs do not"),
    ({"take_over": False} | LOAD, "experts.take_over is false"),
    ({"workers": 9} | LOAD, "is for 1 to 8 workers, but workers is 9"),
    ({"workers": 2, "autoscaling": {"min_workers": 3, "max_workers": 4}}, "is for 3 to 4 workers, but workers is 2"),
    ({"autoscaling": {"min_workers": 3, "max_workers": 2}}, "below min_workers"),
    ({"replicas_per_expert": 2} | LOAD, "with autoscaling there may be 1: raise min_workers"),
    ({"workers": 3, "pools": [GPU, CPU]} | LOAD, "is set per pool"),
])  # fmt: skip
def test_what_load_cannot_scale_is_refused_by_name(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        experts(**section)


def test_what_a_worker_gets_of_its_pool_is_a_configuration() -> None:
    values = {"model": {"path": "/m"}, "ray": {"address": "auto"}, "experts": {
        "workers": 3, "replicas_per_expert": 2, "pools": [GPU, CPU | {"autoscaling": {"max_workers": 2}}]}}  # fmt: skip
    config = Config.model_validate(values)
    for pool in expert_pools(config.experts):
        own = config.model_copy(update={"experts": pool.experts})
        assert Config.model_validate_json(own.model_dump_json()) == own


def test_scaling_by_load_needs_a_cluster_with_room() -> None:
    values: dict[str, Any] = {"model": {"path": "/m"}, "experts": LOAD}
    with pytest.raises(ValidationError, match=r"set ray\.address, or a fixed experts\.workers"):
        Config.model_validate(values)
    assert Config.model_validate(values | {"ray": {"address": "auto"}}).experts.autoscaling is not None
