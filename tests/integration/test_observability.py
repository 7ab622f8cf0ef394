"""What operators see of a real cluster, by a real Prometheus on its service discovery: all of it, and the truth."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.keys.api_keys import key_hash, new_key
from monitoring.alerts.__main__ import all_groups
from monitoring.alerts.rule import Alert, Record
from monitoring.boards.__main__ import all_boards
from monitoring.catalogue import declared
from monitoring.local_prometheus import RULES, Discovery, prometheus, prometheus_config
from tests.certificates import Authority
from tests.cli import Cli, free_port, wait_until
from tests.counted_load import CountedLoad, Shot
from tests.prometheus import PrometheusApi, hurried
from tests.queries import BORROWED, selectors, substituted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_leftovers")]

REFRESH_S = 5.0  # of service discovery, in prometheus_config
PASS_ON_S = 2 * 5.0  # what Prometheus itself takes: its discovery and its scrape manager each hand on every 5 s
SCRAPE_S = 1.0
SILENCE_S = 2.0  # experts.heartbeat_timeout_s
EXPECTED = {"DeepsplitExpertWorkerDown", "DeepsplitExpertsUncovered"}  # of a worker that has no double
KEYS = {tenant: new_key() for tenant in ("operator", "alpha", "beta", "capped", "fickle")}

# (dashboard, panel, legend): why nothing is there to see in this cluster.
WITHOUT_DATA = {
    ("gateway", "Would be refused", "{{class}}"): "only with admission.mode: shadow",
    ("gateway", "Sent to another replica", "{{kind}}"): "no attention replica was lost",
    ("dispatcher", "Failed dispatches", "{{reason}}"): "none failed",
}


@dataclass(frozen=True)
class World:
    """A cluster, what loads it, and what watches it."""

    cli: Cli
    load: CountedLoad
    prometheus: PrometheusApi
    key_file: Path
    ca_file: Path

    def discovered(self) -> dict[str, str]:
        """instance -> role, as service discovery says now."""
        headers = {"Authorization": f"Bearer {KEYS['operator']}"}
        groups = httpx.get(f"{self.load.url}/sd/prometheus", headers=headers, verify=self.load.verify).json()
        return {target: group["labels"]["role"] for group in groups for target in group["targets"]}


@pytest.fixture(scope="module")
def world(no_leftovers: None, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("secrets")
    authority = Authority("ours")
    certificate, private = authority.pair()
    for name, content in {"tls.crt": certificate, "tls.key": private, "ca.crt": authority.pem}.items():
        (folder / name).write_bytes(content)
    (folder / "key").write_text(KEYS["operator"])
    entry: dict[str, Mapping[str, Any]] = {"operator": {"operator": True}, "capped": {"requests_per_minute": 2}}
    tenants = [{"name": name, "keys": [key_hash(key)], **entry.get(name, {})} for name, key in KEYS.items()]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"tenants": tenants}))
    (folder / "keys.yaml").chmod(0o600)
    with tempfile.TemporaryDirectory(prefix="dsplit-", dir="/tmp") as short:
        cli = Cli(tmp_path_factory.mktemp("user"), Path(short))
        cli.up(cli.write_config({
            "model": {"path": str(demo_model), "name": "demo", "dtype": "float32"},
            "attention": {"kv_cache_gib": 0.25, "speculative_tokens": 1, "max_model_len": 1024},
            # Nobody takes over, or no expert would be uncovered for long enough to alert anybody.
            "experts": {
                "workers": 2, "take_over": False, "heartbeat_interval_s": SILENCE_S / 4,
                "heartbeat_timeout_s": SILENCE_S,
            },
            "gateway": {
                "port": free_port(), "grpc_port": free_port(), "replicas": 2, "keys_file": str(folder / "keys.yaml"),
                "tls": {"cert_file": str(folder / "tls.crt"), "key_file": str(folder / "tls.key")},
            },
            "monitoring": {"port": 0},
        }))  # fmt: skip
        try:
            url = cli.status()["gateway"]["rest"]
            load = CountedLoad(url, ssl.create_default_context(cafile=folder / "ca.crt"))
            discovery = Discovery(f"{url}/sd/prometheus", folder / "key", folder / "ca.crt")
            config = prometheus_config(discovery, hurried(RULES, folder), f"{SCRAPE_S:g}s")
            port = free_port()
            with prometheus(config, port):
                api = PrometheusApi(port)
                yield World(cli, load, api, folder / "key", folder / "ca.crt")
                api.close()
        finally:
            cli.down()


def test_every_process_is_a_target(world: World) -> None:
    wait_until("all targets up", lambda: {health for _, health in world.prometheus.targets().values()} == {"up"}, 30)
    roles = Counter(role for role, _ in world.prometheus.targets().values())
    assert roles == {
        "gateway": 2, "admission": 1, "directory": 1, "attention": 1, "engine": 1, "experts": 2, "ray": 1
    }  # fmt: skip
    assert {instance: role for instance, (role, _) in world.prometheus.targets().items()} == world.discovered()


def test_counts_are_those_of_the_load(world: World) -> None:
    alpha, beta, capped = KEYS["alpha"], KEYS["beta"], KEYS["capped"]
    too_long = (("max_tokens", 100_000),)
    world.load.send_all(
        [
            *[Shot(alpha, "alpha", stream=stream, chat=chat) for stream in (True, False) for chat in (True, False)],
            *[Shot(alpha, "alpha", stream=True)] * 8,
            *[Shot(beta, "beta", "batch")] * 6,
            *[Shot(beta, "beta", "batch", stream=True, chat=True)] * 4,
            *[Shot(alpha, "alpha", outcome="client_error", status=400, more=too_long)] * 2,
            Shot(alpha, "alpha", "unknown", outcome="model_not_found", status=404, more=(("model", "other"),)),
            *[Shot("sk-nobody", "unknown", "unknown", outcome="unauthenticated", status=401)] * 3,
        ],
        at_once=4,
    )
    world.load.send_all([Shot(capped, "capped")] * 2, at_once=1)
    world.load.send_all([Shot(capped, "capped", outcome="quota", status=429)] * 3, at_once=1)
    hasty = Shot(alpha, "alpha", outcome="overloaded", status=429, patience_s=1e-4)
    world.load.send_all([hasty] * 2, at_once=1)
    world.load.tokenize(alpha)
    world.load.leave(Shot(KEYS["fickle"], "fickle", "batch", stream=True))
    assert_counts(world)
    by_gateway = world.prometheus.query("sum by (instance) (deepsplit_requests_total)")
    assert len(by_gateway) == 2, "all requests went to one gateway: nothing shows that they are not counted twice"


def assert_counts(world: World) -> None:
    """What Prometheus has counted is what the load generator has, no more and no less."""
    api, load = world.prometheus, world.load

    def seen() -> bool:
        return sum(value for _, value in api.query("deepsplit_requests_total")) >= load.requests.total()

    wait_until("a scrape of all requests", seen, 15)
    assert api.by(
        "sum by (outcome, class, tenant) (deepsplit_requests_total)", "outcome", "class", "tenant"
    ) == dict(load.requests)  # fmt: skip
    for name, expected in (("prompt", load.prompt_tokens), ("generated", load.generated_tokens)):
        tokens = f'deepsplit_{name}_tokens_total{{tenant!="fickle"}}'
        counted = api.by(f"sum by (class, tenant) ({tokens})", "class", "tenant")
        assert {labels: value for labels, value in counted.items() if value} == dict(expected), name
    refused = api.by("sum by (plane) (deepsplit_refusals_total)", "plane")
    assert refused.pop(("quota",)) == sum(n for (outcome, _, _), n in load.requests.items() if outcome == "quota")
    assert api.by("sum by (path, outcome) (deepsplit_other_requests_total)", "path", "outcome")[
        "/tokenize", "ok"
    ] == 1
    assert sum(refused.values()) == sum(n for (outcome, _, _), n in load.requests.items() if outcome == "overloaded")


def test_an_expert_worker_that_hangs_and_is_killed(world: World) -> None:
    """It hangs first, because one that is only killed is replaced within seconds."""
    api = world.prometheus
    before = {instance for instance, role in world.discovered().items() if role == "experts"}
    victim = world.cli.status()["experts"][0]["pid"]
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            world.load.send(Shot(KEYS["alpha"], "alpha", stream=True))

    with ThreadPoolExecutor(1) as pool:
        traffic = pool.submit(keep_asking)
        try:
            os.kill(victim, signal.SIGSTOP)
            wait_until("its end in service discovery", lambda: not before <= experts(world), SILENCE_S + 5)
            assert_follows(world)
            wait_until("the alerts", lambda: api.firing() >= EXPECTED, 30)
            os.kill(victim, signal.SIGKILL)
            wait_until("its successor in service discovery", lambda: len(experts(world) - before) == 1, 60)
            assert_follows(world)
            wait_until("the end of the alerts", lambda: not EXPECTED & api.firing(), 30)
        finally:
            stop.set()
        traffic.result(180)
    assert_counts(world)


def experts(world: World) -> set[str]:
    return {instance for instance, role in world.discovered().items() if role == "experts"}


def assert_follows(world: World) -> None:
    """After one refresh interval Prometheus' targets are those of service discovery."""
    deadline = time.monotonic() + REFRESH_S + PASS_ON_S + SCRAPE_S
    while set(world.prometheus.targets()) != set(world.discovered()):
        assert time.monotonic() < deadline, "targets did not follow within one refresh interval"
        time.sleep(0.2)


def test_counters_never_go_back(world: World) -> None:
    """But with their process: a series that was reset belongs to a target that started anew."""
    api = world.prometheus
    restarted = {labels["instance"] for labels, _ in api.query("changes(process_start_time_seconds[30m]) > 0")}
    checked = 0
    for metric in declared():
        if metric.kind not in ("counter", "histogram"):
            continue
        for name, _ in metric.series():
            resets = api.query(f"resets({name}[30m])")
            checked += len(resets)
            assert {labels["instance"] for labels, value in resets if value > 0} <= restarted, name
    assert checked > 200


def test_every_dashboard_query_has_data(world: World) -> None:
    missing = []
    for board in all_boards():
        for chart in board.charts():
            for query in chart.queries:
                expr = substituted(query.expr, {"__rate_interval": "5m"})
                spot = (board.name, chart.title, query.legend)
                if world.prometheus.has_data(expr) == (spot in WITHOUT_DATA):
                    missing.append((*spot, expr))
    assert missing == []


def test_every_rule_has_data(world: World) -> None:
    missing = []
    for group in all_groups():
        for rule in group.rules:
            if isinstance(rule, Record):
                labels = ",".join(f'{name}="{value}"' for name, value in rule.labels.items())
                if not world.prometheus.has_data(f"{rule.name}{{{labels}}}"):
                    missing.append(rule.name)
            if isinstance(rule, Alert):
                missing += [str(found) for found in selectors(rule.expr) if not world.prometheus.query(str(found))]
    assert missing == []


def test_what_is_not_ours_is_there_too(world: World) -> None:
    assert [name for name in BORROWED if not world.prometheus.query(f"count (last_over_time({name}[30m]))")] == []


def test_observe_on_this_cluster(world: World) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "monitoring.observe", "--port", str(port), "--key-file", str(world.key_file),
         "--ca-file", str(world.ca_file)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(world.cli.folder / "run")}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"Prometheus  http://127.0.0.1:{port} ")
        api = PrometheusApi(port)
        wait_until("all targets", lambda: set(api.targets()) == set(world.discovered()), 30)
        api.close()
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert process.returncode == 130
