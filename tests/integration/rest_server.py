"""The application behind its REST door, on a Ray cluster of its own: what `test_openai_rest` talks to.

The only place that says which application that is.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve

from cluster.config import Config
from deployments.app import BuildArgs, build

MODEL = "tiny"
MAX_MODEL_LEN = 256
_REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class RestServer:
    """A running server: its address, and the name of the model it serves."""

    url: str
    model: str


@contextmanager
def rest_server(checkpoint: Path) -> Iterator[RestServer]:
    """Serve `checkpoint` with MTP drafting, one request body limit of 1 MiB, ready when the block is entered."""
    config = Config.model_validate(
        {
            "model": {"path": str(checkpoint), "name": MODEL},
            "attention": {
                "max_model_len": MAX_MODEL_LEN, "kv_cache_gib": 0.25, "max_num_seqs": 8, "speculative_tokens": 1,
            },
            "gateway": {"port": _free_port(), "max_body_mib": 1},
        }
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="deepsplit-", dir="/tmp"))  # short: sockets live in it
    try:
        ray.init(
            address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder),
            runtime_env={"env_vars": {"PYTHONPATH": str(_REPOSITORY)}},
        )  # fmt: skip
        serve.start(http_options={"host": config.gateway.host, "port": config.gateway.port})
        serve.run(build(BuildArgs(config=config.model_dump_json())), route_prefix="/")
        yield RestServer(f"http://{config.gateway.host}:{config.gateway.port}", MODEL)
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
