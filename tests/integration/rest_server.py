"""The application behind its REST gateway, on a Ray cluster of its own: what `test_openai_rest` talks to.

The only place that says which application that is.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve

from benchmarks.measuring.free_port import free_port
from cluster.config import Config
from cluster.launch.driver import APP, GATEWAY
from deployments.app import BuildArgs, build

MODEL = "tiny"
MAX_MODEL_LEN = 256
READY_S = 30.0
_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RestServer:
    """A running server: its address, and the name of the model it serves."""

    url: str
    model: str
    grpc_address: str  # host:port
    logs: Path  # folder of all processes' log files


@contextmanager
def rest_server(checkpoint: Path, engine_args: Mapping[str, object] | None = None) -> Iterator[RestServer]:
    """Serve `checkpoint` with MTP drafting, a request body limit of 1 MiB and JSON logs down to debug lines; ready when
    the block is entered.
    """
    config = Config.model_validate(
        {
            "model": {"path": str(checkpoint), "name": MODEL},
            "attention": {
                "max_model_len": MAX_MODEL_LEN, "kv_cache_gib": 0.25, "max_num_seqs": 8, "speculative_tokens": 1,
                "engine_args": dict(engine_args or {}),
            },
            "gateway": {"port": free_port(), "grpc_port": free_port(), "max_body_mib": 1},
            "logging": {"format": "json", "level": "debug"},
        }
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="deepsplit-", dir="/tmp"))  # short: sockets live in it
    try:
        ray.init(
            address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder),
            runtime_env={"env_vars": {"PYTHONPATH": str(_REPOSITORY)}},
        )  # fmt: skip
        serve.start(proxy_location="Disabled", logging_config=config.logging.of_serve)
        serve.run(build(BuildArgs(config=config.model_dump_json())), name=APP, route_prefix=None)
        gateway, until_s = serve.get_deployment_handle(GATEWAY, APP), time.monotonic() + READY_S
        while not gateway.ready.remote().result(timeout_s=READY_S):
            assert time.monotonic() < until_s, "the gateway finds no attention replica"
            time.sleep(0.1)
        gateway = config.gateway
        logs = folder / "session_latest" / "logs" / "serve"
        yield RestServer(f"http://{gateway.host}:{gateway.port}", MODEL, f"{gateway.host}:{gateway.grpc_port}", logs)
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
