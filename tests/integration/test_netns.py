"""The bench for several hosts on one machine does what the multi-node tests take for granted."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.integration.netns import Network, Node, RayCluster, _ip

_REPOSITORY = Path(__file__).resolve().parents[2]

_ECHO = """
import socket
server = socket.create_server(("", 7000))
print("listening", flush=True)
while True:
    client, _ = server.accept()
    client.sendall(client.recv(100))
    client.close()
"""

_OWNER = """
import subprocess
from tests.integration.netns import Network
with Network(1) as network:
    (host,) = network.hosts
    network.popen(host, ["sleep", "1000"], stdout=subprocess.DEVNULL)
    print(host.name, flush=True)
    input()
"""

_PLACED = """
import json, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=0)
class Where:
    def address(self):
        return ray.util.get_node_ip_address()

by_resource = Where.options(resources={"expert_host": 1}).remote()
by_label = Where.options(label_selector={"role": "attention"}).remote()
print(json.dumps({
    "alive": sorted(node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]),
    "driver": ray.util.get_node_ip_address(),
    "by_resource": ray.get(by_resource.address.remote(), timeout=60),
    "by_label": ray.get(by_label.address.remote(), timeout=60),
}))
"""


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(3) as network:
        yield network


def _echo(address: str) -> bytes:
    with socket.create_connection((address, 7000), timeout=1) as client:
        client.sendall(b"hello")
        client.settimeout(1)
        return client.recv(100)


def _reachable(address: str) -> bool:
    try:
        return _echo(address) == b"hello"
    except OSError:
        return False


def _wait_for(happened: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"did not happen within {timeout_s} s"
        time.sleep(0.1)


@contextlib.contextmanager
def _killed_at_exit(process: subprocess.Popen[str]) -> Iterator[None]:
    """Popen's own exit waits for the process, for ever if a test fails before it ends it."""
    try:
        yield
    finally:
        process.kill()


def test_a_cut_cable_stops_traffic_until_it_is_restored(network: Network) -> None:
    here, there = network.hosts[:2]
    with network.popen(there, ["python3", "-u", "-c", _ECHO], stdout=-1) as server, _killed_at_exit(server):
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        ask = [
            "python3",
            "-c",
            f"import socket; s = socket.create_connection(('{there.address}', 7000), 2); "
            "s.sendall(b'hi'); print(s.recv(9))",
        ]
        assert network.run(here, ask) == "b'hi'\n"
        assert _echo(there.address) == b"hello"  # this machine reaches the hosts too

        network.cut(there)
        with pytest.raises(OSError, match=r"timed out|No route"):
            _echo(there.address)
        with pytest.raises(AssertionError, match=r"timed out|No route"):
            network.run(here, ask)

        network.restore(there)
        # Neighbours that were given up while the cable was out are asked for again after a while.
        _wait_for(lambda: _reachable(there.address), timeout_s=20)
        assert _echo(there.address) == b"hello"


def test_hosts_and_their_processes_are_gone_afterwards() -> None:
    with Network(1) as network:
        (host,) = network.hosts
        process = network.popen(host, ["sleep", "1000"])
        _wait_for(lambda: process.pid in network.pids(host))
    assert process.wait(5) == -9
    assert not network.hosts
    with Network(1) as again:  # the same names are free again
        assert again.hosts == (host,)


def test_a_killed_run_is_cleaned_up_by_the_next_one() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_REPOSITORY
    )
    assert owner.stdout is not None
    name = owner.stdout.readline().strip()
    _wait_for(lambda: bool(_ip("netns", "pids", name).split()))  # it enters the namespace after it was started
    owner.kill()
    owner.communicate(timeout=10)
    (left,) = _ip("netns", "pids", name).split()
    with Network(1):
        assert name not in _ip("netns", "list")
        assert f"dsplit{owner.pid}b" not in _ip("link")
        assert not psutil.pid_exists(int(left)) or psutil.Process(int(left)).status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_ray_cluster_spans_three_hosts(network: Network) -> None:
    nodes = [
        Node(resources={"attention_host": 1}, labels={"role": "attention"}),
        Node(labels={"role": "experts"}),
        Node(resources={"expert_host": 1}, labels={"role": "experts"}),
    ]
    with RayCluster(network, nodes) as cluster:
        seen = json.loads(cluster.python(_PLACED))
        first, _, third = (host.address for host in network.hosts)
        assert seen == {
            "alive": sorted(host.address for host in network.hosts),
            "driver": first,
            "by_resource": third,
            "by_label": first,
        }
        folder = cluster.folder
    assert not folder.exists()
    assert not any(network.pids(host) for host in network.hosts)
