"""The application: which deployments there are and who holds a handle to whom. The only wiring.

The launcher names it by import string, `deployments.app:build`, as `serve run` and a RayService do.
"""

import json
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict
from ray import serve

from cluster.config import Config
from deployments.admission.replica import admission_deployment
from deployments.attention.deployment import attention_deployment
from deployments.directory.replica import directory_deployment
from deployments.experts.worker import expert_deployments
from deployments.gateway.replica import gateway_deployment


def _parsed(config: object) -> object:
    return json.loads(config) if isinstance(config, str) else config


class BuildArgs(BaseModel):
    """What `serve run` passes on: a whole Config, as JSON in a string or as the mapping itself, as a Serve
    configuration file has it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Annotated[Config, BeforeValidator(_parsed)]
    # The Serve configuration file sets num_replicas of attention; or else `deepsplit scale` does.
    fixed_attention: bool = False


def build(args: BuildArgs) -> serve.Application:
    """gateway -> attention -> directory <- experts; several gateways share one admission."""
    config = args.config
    directory = directory_deployment(config, args.fixed_attention)
    attention = attention_deployment(config, directory, args.fixed_attention)
    others = [*expert_deployments(config, directory)]
    if config.gateway.replicas > 1:
        others.append(admission_deployment(config, directory))
    return gateway_deployment(config, directory, attention, *others)
