"""A Serve application with the real one's deployment names and none of its weight, for tests of the launcher."""

import json
import os
import time

from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from cluster.config import Config
from cluster.errors import CheckpointError


class Args(BaseModel):
    """What the launcher passes."""

    config: str


@serve.deployment(name="Directory", ray_actor_options={"num_cpus": 0})
class Directory:
    def status(self) -> str:
        expert = {"id": "w0", "pid": os.getpid(), "node": "n", "address": "127.0.0.1:1", "state": "ready"}
        experts = [expert | {"experts": {"1": [0, 1]}}, expert | {"id": "w1", "experts": {"1": [2, 3]}}]
        return json.dumps({"model": "tiny", "placement_epoch": 7, "experts": experts, "attention": []})


@serve.deployment(name="gateway", ray_actor_options={"num_cpus": 0})
class Gateway:
    def __init__(self, config: str, directory: DeploymentHandle) -> None:
        self._directory = directory
        if Config.model_validate_json(config).model.name == "broken":
            raise CheckpointError("shard 3 is truncated: copy it again")
        if Config.model_validate_json(config).model.name == "slow":
            time.sleep(600)

    async def __call__(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse(await self._directory.status.remote())


def build(args: Args) -> serve.Application:
    """Same signature as `deployments.app:build`."""
    return Gateway.bind(args.config, Directory.bind())
