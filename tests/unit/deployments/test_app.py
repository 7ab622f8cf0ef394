"""What the application's builder takes: the launcher's JSON, or a Serve configuration file's mapping."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from cluster.config import Config
from deployments.app import BuildArgs
from deployments.attention.deployment import attention_deployment
from deployments.directory.replica import directory_deployment

MAPPING = {"model": {"path": "/models/x"}, "experts": {"workers": 3, "shares": [2, 1, 1]}, "ray": {"address": "auto"}}


def test_a_mapping_and_its_json_are_the_same_configuration() -> None:
    config = Config.model_validate(MAPPING)
    assert BuildArgs.model_validate({"config": MAPPING}).config == config
    assert BuildArgs.model_validate({"config": config.model_dump_json()}).config == config


def test_a_wrong_key_is_named() -> None:
    with pytest.raises(ValidationError, match=r"config\.experts\.wokers\n +Extra inputs are not permitted"):
        BuildArgs.model_validate({"config": MAPPING | {"experts": {"wokers": 3}}})


@pytest.mark.parametrize("fixed", [True, False])
def test_who_sets_the_number_of_attention_replicas(demo_model: Path, fixed: bool) -> None:
    config = Config.model_validate({"model": {"path": demo_model}, "attention": {"replicas": 3}})
    attention = attention_deployment(config, directory_deployment(config, fixed), fixed)._bound_deployment
    scaling = attention._deployment_config.autoscaling_config
    if fixed:  # a Serve configuration file's num_replicas would not count beside a policy
        assert (attention.num_replicas, scaling) == (3, None)
    else:
        assert scaling is not None
        assert scaling.initial_replicas == 3
