from __future__ import annotations

from typing import Any

import pytest

from cluster.config import Config
from deployments.attention.deployment import placement_bundles
from deployments.directory.members import EngineStats


def config(**attention: Any) -> Config:
    return Config.model_validate({"model": {"path": "/model"}, "attention": attention})


def test_a_cpu_replica_is_one_bundle() -> None:
    assert placement_bundles(config()) == [{"CPU": 1.0}]
    assert placement_bundles(config(placement={"num_cpus": 4, "resources": {"attention_host": 1}})) == [
        {"CPU": 4.0, "attention_host": 1.0}
    ]


def test_a_cuda_replica_has_one_gpu_per_rank() -> None:
    bundles = placement_bundles(config(device="cuda", tensor_parallel_size=3))
    assert bundles == [{"CPU": 1.0, "GPU": 1.0}, {"GPU": 1.0}, {"GPU": 1.0}]


@pytest.mark.parametrize(("drafted", "accepted", "rate"), [(0, 0, None), (8, 6, 0.75)])
def test_acceptance(drafted: int, accepted: int, rate: float | None) -> None:
    stats = EngineStats(0, 0, 0.0, spec_draft_tokens=drafted, spec_accepted_tokens=accepted,
                        generation_tokens=0, prompt_tokens=0)  # fmt: skip
    assert stats.spec_acceptance == rate
