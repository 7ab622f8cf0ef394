"""Both ports of a real gateway process under broken and hostile clients: it serves on, leaks nothing, stays flat."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import psutil
import pytest

from benchmarks.fakes.gateway_process import GatewayProcess
from benchmarks.fakes.replica_process import FakeReplica, FakeReplicas
from benchmarks.fakes.service_model import ServiceModel
from cluster.config import Config
from tests.cli import free_port
from tests.integration import grpc_attacks, http_attacks
from tests.integration.http_attacks import Attack, Target

pytestmark = pytest.mark.usefixtures("no_leftovers")

MODEL = "fake"
AT_ONCE = 20
# From one of several equal rounds to the next: caches fill up, a leak goes on. A leak of one connection's buffers per
# attack would be several times as much: 20 times 1.4 MB for the endless header list alone.
GROWTH_BYTES = 8 * 2**20
ROUNDS = 5
RELEASE_S = 15.0  # gRPC keeps what it has read of a broken connection for some seconds
SERVICE = ServiceModel(slots=512, kv_cache_tokens=2**22, base_s=0.005, sequence_s=0.0, prefill_tokens_per_s=1e6)


class Gateway:
    """The process under attack, and what it says of itself."""

    def __init__(self, process: GatewayProcess, grpc_port: int) -> None:
        host, _, port = process.address.rpartition(":")
        self.http, self.grpc = Target(host, int(port), MODEL), Target(host, grpc_port, MODEL)
        self.process = psutil.Process(process.process.pid)
        self._trim = process.trim
        self.url = f"http://{process.address}"

    def completes(self) -> bool:
        body = {"model": MODEL, "prompt": "def f(", "max_tokens": 3}
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=5)
        return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 3

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            status = httpx.get(f"{self.url}/v1/deepsplit/status", timeout=5).json()["gateway"]
            (replica,) = status["replicas"]
            if status["tickets"] == status["open_requests"] == replica["running"] == replica["waiting"] == 0:
                return
            time.sleep(0.1)
        raise AssertionError(f"something is left: {status}")

    def held_bytes(self, enough: int) -> int:
        """Memory without what the allocator merely keeps; waits until it is `enough` or no less comes."""
        deadline, least = time.monotonic() + RELEASE_S, 2**63
        while least > enough and time.monotonic() < deadline:
            self._trim()
            time.sleep(0.5)
            least = min(least, self.process.memory_info().rss)
        return least


@pytest.fixture(scope="module")
def gateway(no_leftovers: None) -> Iterator[Gateway]:
    grpc_port = free_port()
    config = Config.model_validate(
        {
            "model": {"path": "/nonexistent", "name": MODEL},
            "gateway": {"port": free_port(), "grpc_port": grpc_port, "drain_timeout_s": 1},
        }
    )
    with ExitStack() as stack:
        replicas = stack.enter_context(FakeReplicas([FakeReplica("r0", SERVICE, MODEL, None)]))
        yield Gateway(stack.enter_context(GatewayProcess(config, replicas.endpoints)), grpc_port)


GRPC_ATTACKS = grpc_attacks.attacks("/deepsplit.v1.Inference/CompleteStream")


async def attack(one: Attack, target: Target) -> None:
    await asyncio.gather(*(http_attacks.run(one, target, random.Random(seed)) for seed in range(AT_ONCE)))


@pytest.mark.parametrize("one", http_attacks.ATTACKS, ids=lambda one: one.__name__)
def test_rest_survives(gateway: Gateway, one: Attack) -> None:
    asyncio.run(attack(one, gateway.http))
    assert gateway.completes()
    gateway.wait_until_idle()


@pytest.mark.parametrize("one", GRPC_ATTACKS, ids=lambda one: one.__name__)
def test_grpc_survives(gateway: Gateway, one: Attack) -> None:
    asyncio.run(attack(one, gateway.grpc))
    assert asyncio.run(grpc_attacks.is_serving(gateway.grpc))
    gateway.wait_until_idle()


def test_wrong_messages_get_an_answer(gateway: Gateway) -> None:
    methods = grpc_attacks.methods(gateway.grpc)
    assert len(methods) > 5
    asyncio.run(grpc_attacks.wrong_messages(gateway.grpc, methods, random.Random(1), 300))
    gateway.wait_until_idle()


def test_clients_are_served_while_others_attack(gateway: Gateway) -> None:
    async def under_attack() -> list[bool]:
        attacks = [attack(one, gateway.http) for one in http_attacks.ATTACKS]
        attacks += [attack(one, gateway.grpc) for one in GRPC_ATTACKS]
        served = [asyncio.to_thread(gateway.completes) for _ in range(10)]
        return (await asyncio.gather(*served, *attacks))[:10]

    assert all(asyncio.run(under_attack()))


def test_memory_and_descriptors_are_flat(gateway: Gateway) -> None:
    def one_round() -> int:
        for one in http_attacks.ATTACKS:
            asyncio.run(attack(one, gateway.http))
        for one in GRPC_ATTACKS:
            asyncio.run(attack(one, gateway.grpc))
        gateway.wait_until_idle()
        return gateway.process.num_fds()

    fds, held = one_round(), gateway.held_bytes(0)
    seen = [(fds, held)]
    while len(seen) < ROUNDS:
        before_fds, before = fds, held
        fds, held = one_round(), gateway.held_bytes(before + GROWTH_BYTES)
        seen.append((fds, held))
        # Two descriptors: a keep-alive connection of our own, more or less.
        if held - before < GROWTH_BYTES and fds <= before_fds + 2:
            return
    raise AssertionError(f"it grew in every round: {seen}")
