"""The demo profile as rendered runs: real Ray nodes, one per pod, with the pods' users, mounts, Secrets and limits."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.cli import wait_until
from tests.helm.chart import NAME, Manifest, render
from tests.helm.local_pod import LocalPod, quantity_bytes
from tests.helm.local_service import LocalService
from tests.integration.netns import Network

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]


@pytest.fixture(scope="module")
def objects() -> list[Manifest]:
    return render(base="demo")


@pytest.fixture(scope="module")
def service(no_leftovers: None, objects: list[Manifest]) -> Iterator[LocalService]:
    with Network(LocalService.size(objects)) as network, LocalService(objects, network) as running:
        running.deploy()
        running.await_ready(180)
        yield running


@pytest.fixture
def client(service: LocalService) -> Iterator[httpx.Client]:
    """A client with the operator's key and the generated authority's certificate."""
    (gateway,) = service.by_role["gateway"]
    key = base64.b64decode(service.secrets[f"{NAME}-operator-key"]["data"]["key"]).decode()
    headers = {"authorization": f"Bearer {key}"}
    base = f"https://{gateway.host.address}:8000"
    with httpx.Client(base_url=base, headers=headers, verify=False, timeout=60) as made:
        yield made


def test_helm_test_passes(service: LocalService) -> None:
    (pod,) = service.by_role["test"]
    said = pod.run(pod.pod.spec["containers"][0]["command"])
    assert "refusals: 401 unauthenticated, UNAUTHENTICATED" in said
    assert "discovery: " in said
    assert "all well" in said


def test_every_role_is_where_its_group_is(service: LocalService, client: httpx.Client) -> None:
    status = client.get("/v1/deepsplit/status").json()
    for role in ("attention", "experts"):
        nodes = sorted(process["node"] for process in status[role])
        assert nodes == sorted(pod.host.address for pod in service.by_role[role])


def test_a_pod_that_is_deleted_ends_its_streams_first(service: LocalService, client: httpx.Client) -> None:
    """The gateway's preStop hook: what runs ends as if nothing happened, what is new is refused, then the pod goes."""
    (gateway,) = service.by_role["gateway"]
    events: list[str] = []
    began, log = threading.Event(), service.folder / "hook.log"

    def stream() -> None:
        body = {"model": "deepsplit-demo", "prompt": "class A:", "max_tokens": 600, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                began.set()
                events.append(line)

    streaming = threading.Thread(target=stream)
    with gateway.start(gateway.pod.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"], log) as hook:
        wait_until("the hook has found its node", lambda: "leaves in" in log.read_text(), 60)
        streaming.start()
        assert began.wait(4)  # while the pod still takes requests
        refused = await_refusal(client)
        assert refused.status_code == 503, f"{refused.text}\n{log.read_text()}"
        assert refused.json()["error"]["code"] == "draining"
        assert not service.answers(service.probe(gateway, "readiness"))
        assert "data: [DONE]" not in events  # it still runs, and the hook waits for it
        assert hook.poll() is None
        streaming.join(60)
        assert hook.wait(30) == 0, log.read_text()
    assert [line for line in events if line][-1] == "data: [DONE]"
    assert sum(len(json.loads(event[6:])["choices"]) for event in events if event.startswith("data: {")) > 100
    assert log.read_text().endswith("drained\n")


def await_refusal(client: httpx.Client) -> httpx.Response:
    deadline = time.monotonic() + 30
    while True:
        answer = client.post("/v1/completions", json={"model": "deepsplit-demo", "prompt": "x", "max_tokens": 1})
        if answer.status_code != 200 or time.monotonic() > deadline:
            return answer
        time.sleep(0.2)


def test_the_limits_are_enough(service: LocalService) -> None:
    """Runs last: by now every pod has done its work."""

    def fraction(pod: LocalPod) -> float:
        limit = quantity_bytes(pod.pod.spec["containers"][0]["resources"]["limits"]["memory"])
        return pod.peak_bytes / limit

    fractions = {f"{pod.pod.role} {pod.host.name}": round(fraction(pod), 2) for pod in service.all_pods}
    assert not any(pod.was_short_of_memory for pod in service.all_pods), fractions
    assert max(fractions.values()) < 0.8, fractions
    limits = sum(
        quantity_bytes(pod.pod.spec["containers"][0]["resources"]["limits"]["memory"]) for pod in service.all_pods
    )
    assert limits < 15 * 2**30  # with Kubernetes' own on a machine of 16 GiB
