"""Several hosts on one machine: network namespaces joined by a bridge, and a real Ray cluster over them.

    with Network(3) as network, RayCluster(network, [Node(), Node(resources={"expert_host": 1}), ...]) as cluster:
        cluster.python("import ray; ray.init(address='...'); ...")
        network.cut(network.hosts[2])

Each host has its own address, loopback and ports, and all share the file system, `/dev/shm` and the process table of
this machine. So `ray.init(address="auto")` and `ray stop` see every Ray on the machine: give addresses, and leave the
stopping to this module, which ends exactly the processes that live in its own namespaces.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAME = re.compile(r"dsplit(\d+)n\d+")  # the owner's process id and the host's number
_GCS_PORT = 6379


class NetworkUnavailable(Exception):
    """This machine cannot make network namespaces; the message names what is missing."""


@dataclass(frozen=True)
class Host:
    """One namespace: `name` for `ip netns exec`, `address` on the bridge, `link` the bridge's end of its cable."""

    name: str
    address: str
    link: str


class Network:
    """`size` hosts on one bridge, 10.77.x.1 and up; this machine itself is 10.77.x.254 and reaches them all.

    Raises `NetworkUnavailable` without root or iproute2. On exit every process in the namespaces is killed.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._bridge = f"dsplit{os.getpid()}b"
        self.hosts: tuple[Host, ...] = ()

    def __enter__(self) -> Network:
        if os.geteuid() != 0:
            raise NetworkUnavailable("network namespaces need root: run the tests as root (CI does)")
        if shutil.which("ip") is None:
            raise NetworkUnavailable("network namespaces need the `ip` command: apt-get install iproute2")
        _remove_orphans()
        subnet = _free_subnet()
        try:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("address", "add", f"{subnet}.254/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
            for number in range(1, self._size + 1):
                self._add_host(subnet, number)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add_host(self, subnet: str, number: int) -> None:
        name = f"dsplit{os.getpid()}n{number}"
        host = Host(name, f"{subnet}.{number}", _link(name))
        _ip("netns", "add", host.name)
        self.hosts += (host,)
        _ip("link", "add", host.link, "type", "veth", "peer", "name", "eth0", "netns", host.name)
        _ip("link", "set", host.link, "master", self._bridge, "up")
        _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
        _ip("-n", host.name, "link", "set", "eth0", "up")
        # Ray finds its own address by the route to a public one; nothing is ever sent there.
        _ip("-n", host.name, "route", "add", "default", "via", f"{subnet}.254")

    def popen(self, host: Host, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Start `command` on `host`; `options` are those of `subprocess.Popen`."""
        return subprocess.Popen(["ip", "netns", "exec", host.name, *command], text=True, **options)

    def run(
        self, host: Host, command: Sequence[str | Path], *, timeout_s: float = 120, env: Mapping[str, str] | None = None
    ) -> str:
        """Run `command` on `host` and return what it prints; AssertionError with all its output if it fails."""
        process = self.popen(
            host, command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        try:
            output, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
            raise AssertionError(f"{command} on {host.name}: no end within {timeout_s} s\n{output}\n{errors}") from None
        assert process.returncode == 0, f"{command} on {host.name}: exit {process.returncode}\n{output}\n{errors}"
        return output

    def pids(self, host: Host) -> set[int]:
        """Every process that lives on `host`."""
        return {int(pid) for pid in _ip("netns", "pids", host.name).split()}

    def cut(self, host: Host) -> None:
        """Pull the cable of `host`: packets vanish both ways, nobody is told."""
        _ip("link", "set", host.link, "down")

    def restore(self, host: Host) -> None:
        """Put the cable back."""
        _ip("link", "set", host.link, "up")

    def close(self) -> None:
        """Kill everything on the hosts and remove them."""
        for host in self.hosts:
            _remove_namespace(host.name)
        self.hosts = ()
        _ip("link", "delete", self._bridge, check=False)


@dataclass(frozen=True)
class Node:
    """What one Ray node offers."""

    num_cpus: int = 4
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


class RayCluster:
    """A Ray cluster with one node per host of `network`, the first the head. No dashboard, no usage report.

    `address` is what `ray.init` takes on any of the hosts, given `environment`: the cluster has its own token, because
    Ray demands the one in `~/.ray/auth_token` if another cluster has left it there, and none otherwise.
    Each node has its own temporary directory below `folder`.
    """

    def __init__(self, network: Network, nodes: Sequence[Node]) -> None:
        assert len(nodes) == len(network.hosts), "one node per host"
        self._network, self._nodes = network, tuple(nodes)
        self.address = f"{network.hosts[0].address}:{_GCS_PORT}"
        self._token = secrets.token_hex(32)

    def __enter__(self) -> RayCluster:
        # A short path: Ray's sockets lie deep below it, and a socket's path has at most 107 bytes.
        self.folder = Path(tempfile.mkdtemp(prefix="dsplit-"))
        roles: list[tuple[str, ...]] = [("--address", self.address)] * len(self._nodes)
        roles[0] = ("--head", "--port", str(_GCS_PORT), "--include-dashboard", "false")
        try:
            # All at once: the imports take most of the time, and nodes wait for their head.
            starts = [
                self._start(host, node, *role)
                for host, node, role in zip(self._network.hosts, self._nodes, roles, strict=True)
            ]
            for start in starts:
                self._finish(start)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def environment(self) -> dict[str, str]:
        """Environment for drivers: this process's, without what points to another Ray, with what opens this one."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def python(self, script: str, *, host: Host | None = None, timeout_s: float = 120) -> str:
        """Run a Python script on `host` (the head if not given) with RAY_ADDRESS set; what it prints."""
        command = [sys.executable, "-c", script]
        return self._network.run(host or self._network.hosts[0], command, timeout_s=timeout_s, env=self.environment)

    def _start(self, host: Host, node: Node, *role: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in self.environment.items() if name != "RAY_ADDRESS"}
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            *role,
            "--node-ip-address",
            host.address,
            "--temp-dir",
            str(self.folder / host.name),
            "--num-cpus",
            str(node.num_cpus),
            "--resources",
            json.dumps(dict(node.resources)),
            "--object-store-memory",
            str(100 << 20),
            "--labels",
            ",".join(f"{name}={value}" for name, value in node.labels.items()),
            "--include-log-monitor",
            "false",
            "--disable-usage-stats",
        ]
        return self._network.popen(
            host, command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def _finish(self, start: subprocess.Popen[str]) -> None:
        output, _ = start.communicate(timeout=180)
        assert start.returncode == 0, f"ray start failed:\n{output}"

    def kill(self, host: Host) -> None:
        """Kill all that runs on `host`, as when it loses its power."""
        _kill_all(host.name)

    def close(self) -> None:
        """Kill the nodes and remove their files. The namespaces stay: they are the network's."""
        for host in self._network.hosts:
            _kill_all(host.name)
        shutil.rmtree(self.folder, ignore_errors=True)


def _ip(*arguments: str, check: bool = True) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise NetworkUnavailable(f"`ip {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout


def _link(namespace: str) -> str:
    return namespace.replace("n", "v")  # dsplit123n1 -> dsplit123v1, within the 15 characters of a link's name


def _free_subnet() -> str:
    taken = _ip("-o", "-4", "address")
    start = os.getpid()
    for offset in range(254):
        subnet = f"10.77.{(start + offset) % 254 + 1}"
        if f" {subnet}." not in taken:
            return subnet
    raise NetworkUnavailable("every network 10.77.x.0/24 is taken: remove stale bridges with `ip link delete`")


def _kill_all(namespace: str, timeout_s: float = 10) -> None:
    """Kill every process in a namespace, new ones included, until there is none."""
    deadline = time.monotonic() + timeout_s
    while pids := _ip("netns", "pids", namespace, check=False).split():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        assert time.monotonic() < deadline, f"{namespace}: {pids} do not die"
        time.sleep(0.05)


def _remove_namespace(name: str) -> None:
    _kill_all(name)
    # The kernel takes a namespace down some time after its removal: without this the cable's name stays taken.
    _ip("link", "delete", _link(name), check=False)
    _ip("netns", "delete", name, check=False)


def _remove_orphans() -> None:
    """Remove what a killed test run left: namespaces and bridges whose owner lives no more."""
    for name in re.findall(r"^(dsplit\d+n\d+)", _ip("netns", "list"), re.MULTILINE):
        match = _NAME.fullmatch(name)
        if match and not Path(f"/proc/{match[1]}").exists():
            _remove_namespace(name)
    for bridge, owner in re.findall(r"(dsplit(\d+)b)", _ip("-o", "link", "show", "type", "bridge")):
        if not Path(f"/proc/{owner}").exists():
            _ip("link", "delete", bridge, check=False)
