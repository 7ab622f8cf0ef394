"""What the application's builder takes: the launcher's JSON, or a Serve configuration file's mapping."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from cluster.config import Config
from deployments.app import BuildArgs

MAPPING = {"model": {"path": "/models/x"}, "experts": {"workers": 3, "shares": [2, 1, 1]}, "ray": {"address": "auto"}}


def test_a_mapping_and_its_json_are_the_same_configuration() -> None:
    config = Config.model_validate(MAPPING)
    assert BuildArgs.model_validate({"config": MAPPING}).config == config
    assert BuildArgs.model_validate({"config": config.model_dump_json()}).config == config


def test_a_wrong_key_is_named() -> None:
    with pytest.raises(ValidationError, match=r"config\.experts\.wokers\n +Extra inputs are not permitted"):
        BuildArgs.model_validate({"config": MAPPING | {"experts": {"wokers": 3}}})
