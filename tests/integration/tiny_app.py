"""A Serve application with the real one's deployment names and none of its weight, for tests of the launcher."""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

from cluster.config import Config
from cluster.errors import CheckpointError

DRAIN_S = 2.0  # how long the one open request of the model named "busy" takes to end


class Args(BaseModel):
    """What the launcher passes."""

    config: str


@serve.deployment(name="Directory", ray_actor_options={"num_cpus": 0})
class Directory:
    def __init__(self, config: str) -> None:
        self._busy = Config.model_validate_json(config).model.name == "busy"
        self._draining_since: float | None = None

    def status(self) -> str:
        expert = {"id": "w0", "pid": os.getpid(), "node": "n", "address": "127.0.0.1:1", "state": "ready"}
        experts = [expert | {"experts": {"1": [0, 1]}}, expert | {"id": "w1", "experts": {"1": [2, 3]}}]
        return json.dumps({"model": "tiny", "placement_epoch": 7, "experts": experts, "attention": []})

    def drain(self) -> int:
        self._draining_since = self._draining_since or time.monotonic()
        return int(self._busy and time.monotonic() - self._draining_since < DRAIN_S)


@serve.deployment(name="gateway", ray_actor_options={"num_cpus": 0})
class Gateway:
    def __init__(self, config_json: str, directory: DeploymentHandle) -> None:
        config = Config.model_validate_json(config_json)
        if config.model.name == "broken":
            raise CheckpointError("shard 3 is truncated: copy it again")
        if config.model.name == "slow":
            time.sleep(600)
        self._server = ThreadingHTTPServer((config.gateway.host, config.gateway.port), Hello)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def ready(self) -> bool:
        return True


class Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"tiny")


def build(args: Args) -> serve.Application:
    """Same signature as `deployments.app:build`."""
    return Gateway.bind(args.config, Directory.bind(args.config))
