"""A rendered RayService as processes of this machine: what KubeRay would do with it, without Kubernetes.

One host per pod. Ray is started as KubeRay starts it, from each group's start parameters, resources and limits; then
the very `serveConfigV2` goes to the head's dashboard, as the operator sends it.
"""

from __future__ import annotations

import json
import secrets as random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import yaml

from tests.helm.chart import NAME, Manifest, Pod, groups, of_kind, pods, the
from tests.helm.local_pod import LocalPod, quantity_bytes
from tests.integration.netns import Host, Network

RAY = ["python", "-m", "ray.scripts.scripts"]
GCS_PORT = 6379


def start_command(group: Manifest, head: str | None) -> list[str]:
    """`ray start` of a group; `head`: host name of the head, None for the head itself."""
    parameters = dict(group["rayStartParams"]) | {"block": "true"}
    resources = {name: float(amount) for name, amount in group["resources"].items()}
    parameters["num-cpus"] = str(int(resources.pop("CPU")))
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    parameters["memory"] = str(quantity_bytes(limits["memory"]))
    if resources:
        parameters["resources"] = json.dumps(resources)
    if head is not None:
        parameters["address"] = f"{head}:{GCS_PORT}"
    flags = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in parameters.items()]
    return [*RAY, "start", *(["--head"] if head is None else []), *flags]


class LocalService:
    """Everything that `objects` describe, running. One service at a time per process."""

    def __init__(self, objects: Sequence[Manifest], network: Network) -> None:
        self._objects, self._network = objects, network
        self._token = random.token_hex(32)
        self.secrets = {secret["metadata"]["name"]: secret for secret in of_kind(objects, "Secret")}
        self.service = the(objects, "RayService")
        self.by_role: dict[str, list[LocalPod]] = {}
        self._starting: list[subprocess.Popen[str]] = []

    @staticmethod
    def size(objects: Sequence[Manifest]) -> int:
        """Hosts that it needs: one per pod, the test's among them."""
        return 2 + sum(group["replicas"] for name, group in groups(the(objects, "RayService")) if name != "head")

    def __enter__(self) -> LocalService:
        self.folder = Path(tempfile.mkdtemp(prefix="dsplit-", dir="/tmp"))
        self.folder.chmod(0o755)
        hosts = iter(self._network.hosts)
        placed = [
            (name, group, next(hosts))
            for name, group in groups(self.service)
            for _ in range(group.get("replicas", 1))
        ]  # fmt: skip
        (gateway,) = (host for name, _, host in placed if name == "gateway")
        self._names = {f"{NAME}-head": placed[0][2].address, NAME: gateway.address}
        try:
            by_group = {pod.where: pod for pod in pods(self._objects)}
            for name, group, host in placed:
                pod = self._add(by_group[f"group {name}"], host)
                command = start_command(group, None if name == "head" else f"{NAME}-head")
                self._starting.append(pod.start(command, self.folder / f"{host.name}.log"))
                if name == "head":
                    ready = self.probe(pod, "readiness")
                    self._until(lambda ready=ready: self.answers(ready), 60, "the head")
            self._add(next(pod for pod in by_group.values() if pod.role == "test"), next(hosts))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, pod: Pod, host: Host) -> LocalPod:
        head = pod.role == "head"
        environment = {} if pod.role == "test" else {
            "RAY_ADDRESS": f"{'127.0.0.1' if head else f'{NAME}-head'}:{GCS_PORT}",
            "RAY_AUTH_MODE": self.service["spec"]["rayClusterConfig"]["authOptions"]["mode"],
            "RAY_AUTH_TOKEN": self._token,
            # gRPC's own resolver asks a DNS server even for names in /etc/hosts, and there is none here.
            "GRPC_DNS_RESOLVER": "native",
        }  # fmt: skip
        made = LocalPod(
            pod, host, self._network, self.folder / host.name, self.secrets, self._names, environment
        )
        self.by_role.setdefault(pod.role, []).append(made)
        return made

    @property
    def all_pods(self) -> list[LocalPod]:
        """All of them."""
        return [pod for group in self.by_role.values() for pod in group]

    def deploy(self) -> None:
        """Hand Serve its configuration, as KubeRay does."""
        config = yaml.safe_load(self.service["spec"]["serveConfigV2"])
        url = f"http://{self._names[f'{NAME}-head']}:8265/api/serve/applications/"
        allowed = {"authorization": f"Bearer {self._token}"}
        self._until(lambda: httpx.get(url, headers=allowed, timeout=10).status_code == 200, 60, "the dashboard")
        assert httpx.put(url, json=config, timeout=30).status_code == 401  # without the token
        answer = httpx.put(url, json=config, headers=allowed, timeout=30)
        assert answer.status_code == 200, answer.text

    def probe(self, pod: LocalPod, kind: str) -> str:
        """URL of a pod's probe, as the kubelet asks it."""
        container = pod.pod.spec["containers"][0]
        get = container[f"{kind}Probe"]["httpGet"]
        port = {p["name"]: p["containerPort"] for p in container["ports"]}.get(get["port"], get["port"])
        return f"{get.get('scheme', 'HTTP').lower()}://{pod.host.address}:{port}{get['path']}"

    def answers(self, url: str) -> bool:
        """Whether a probe succeeds. The kubelet does not look at certificates either."""
        try:
            return httpx.get(url, verify=False, timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def await_ready(self, timeout_s: float) -> None:
        """Until every pod's readiness probe succeeds."""
        for pod in self.all_pods:
            if pod.pod.role != "test":
                url = self.probe(pod, "readiness")
                self._until(lambda url=url: self.answers(url), timeout_s, url)

    def _until(self, happened: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if happened():
                    return
            except httpx.HTTPError:
                pass
            ended = [process.args for process in self._starting if process.poll() is not None]
            assert not ended, f"ended early: {ended}\n{self.logs()}"
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s\n{self.logs()}"
            time.sleep(0.5)

    def logs(self) -> str:
        """The last words of every node."""
        return "\n".join(f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        """Kill everything and remove its files."""
        self._network.close()
        for process in self._starting:
            process.wait(10)
        for pod in self.all_pods:
            pod.close()
        shutil.rmtree(self.folder, ignore_errors=True)
