"""Gateways, their common admission and fake replicas as processes that can be killed and replaced."""

from __future__ import annotations

import itertools
import os
import random
import secrets
import signal
import socket
import tempfile
import time
import urllib.request
from pathlib import Path

import msgspec

from benchmarks.fakes.gateway_process import GatewayProcess
from benchmarks.fakes.model import write_model
from benchmarks.fakes.replica_process import FakeReplica, FakeReplicas
from benchmarks.fakes.service_model import ServiceModel
from cluster.config import Config
from deployments.directory.members import AdmissionEndpoint, ReplicaEndpoint
from routing.requests.request import ReplicaLoad

MODEL = "fake"


class FaultCluster:
    """Starts everything; `close` ends it. Its methods block: not for an event loop's own thread."""

    def __init__(self, service: ServiceModel, gateways: int = 2, replicas: int = 3) -> None:
        self._service = service
        self._names = itertools.count()
        self._token = secrets.token_hex(16)
        self._replicas: dict[str, FakeReplicas] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="deepsplit-")
        model = write_model(Path(self._folder.name))
        self._held: list[socket.socket] = []
        self._configs = [self._config(model, gateways) for _ in range(gateways)]
        self._admission: GatewayProcess | None = None
        self._gateways: list[GatewayProcess | None] = [None] * gateways
        self.urls = [f"http://127.0.0.1:{config.gateway.port}" for config in self._configs]
        try:
            for _ in range(replicas):
                self._add_replica()
            self._admission = self._start_admission()
            for index in range(gateways):
                self.start_gateway(index)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End everything at once."""
        for process in (*self._gateways, self._admission, *self._replicas.values()):
            if process is not None:
                process.kill()
        for held in self._held:
            held.close()
        self._folder.cleanup()

    def start_gateway(self, index: int) -> None:
        """Start a gateway in place of one that ended. Returns when it listens."""
        self._gateways[index] = GatewayProcess(self._configs[index], self._endpoints(), self._admission_endpoint())

    def kill_gateway(self, index: int) -> None:
        """Kill a gateway (SIGKILL)."""
        self._taken(index).kill()

    def drain_gateway(self, index: int) -> None:
        """Stop a gateway (SIGTERM). Returns when it has ended."""
        self._taken(index).stop()

    def replace_admission(self) -> None:
        """Kill the common admission (SIGKILL) and start another one on another port."""
        assert self._admission is not None
        self._admission.kill()
        self._admission = self._start_admission()
        self._tell()

    def replace_replica(self, how: signal.Signals) -> int:
        """End one, then start another one and tell everybody. Returns the requests that the old one had."""
        victim = self._replicas.pop(random.choice(list(self._replicas)))
        had = _requests_at(victim.endpoints[0])
        os.kill(victim.process.pid, how)
        self._add_replica()
        self._tell()
        if how is signal.SIGSTOP:
            time.sleep(4)  # as long as it takes to be noticed by its silence
        victim.kill()
        return had

    # --- parts ---

    def _taken(self, index: int) -> GatewayProcess:
        process, self._gateways[index] = self._gateways[index], None
        assert process is not None
        return process

    def _config(self, model: Path, gateways: int) -> Config:
        ports = {"port": self._hold_port(), "grpc_port": self._hold_port()}
        return Config.model_validate(
            {
                "model": {"path": str(model), "name": MODEL},
                "gateway": ports | {"replicas": gateways, "drain_timeout_s": 20},
            }
        )

    def _hold_port(self) -> int:
        """Reserve a port by binding it without listening: nobody else gets it while its gateway is dead."""
        held = socket.socket()
        self._held.append(held)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])

    def _add_replica(self) -> None:
        name = f"r{next(self._names)}"
        self._replicas[name] = FakeReplicas([FakeReplica(name, self._service, MODEL, None)])

    def _endpoints(self) -> list[ReplicaEndpoint]:
        return [endpoint for process in self._replicas.values() for endpoint in process.endpoints]

    def _admission_endpoint(self) -> AdmissionEndpoint:
        assert self._admission is not None
        return AdmissionEndpoint(self._admission.address, self._token)

    def _tell(self) -> None:
        assert self._admission is not None
        self._admission.update(self._endpoints())
        for process in self._gateways:
            if process is not None:
                process.update(self._endpoints(), self._admission_endpoint())

    def _start_admission(self) -> GatewayProcess:
        return GatewayProcess(self._configs[0], self._endpoints(), token=self._token)


def _requests_at(endpoint: ReplicaEndpoint) -> int:
    request = urllib.request.Request(f"{endpoint.url}/deepsplit/load")
    request.add_header("authorization", f"Bearer {endpoint.token}")
    with urllib.request.urlopen(request, timeout=10) as answer:
        load = msgspec.json.decode(answer.readline(), type=ReplicaLoad)
    return load.running + load.waiting
