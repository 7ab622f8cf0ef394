"""Values that cannot work fail when they are rendered, with a message that names the value and the fix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.config import Config, section_type
from tests.helm.chart import CHART, NAMESPACE, RELEASE, HelmError, helm, render
from tests.helm.fake_api import FakeApi

Values = dict[str, Any]
MODEL = {"path": "/models/x"}

MISTAKES: dict[str, tuple[Values, str]] = {
    # The schema: keys, types, ranges, choices.
    "unknown value": ({"gatewy": {}}, "Additional property gatewy is not allowed"),
    "unknown value of a role": ({"attention": {"replica": 2}}, "attention: Additional property replica is not allowed"),
    "unknown value of a group": (
        {"experts": {"groups": {"cpu": {"wrkers": 1}}}}, "experts.groups.cpu: Additional property wrkers",
    ),
    "unknown configuration key": (
        {"config": {"experts": {"wokers": 3}}}, "config.experts: Additional property wokers is not allowed",
    ),
    "unknown engine argument": (
        {"config": {"attention": {"engine_args": {"max_num_batched_tokns": 1}}}},
        "config.attention.engine_args: Additional property max_num_batched_tokns is not allowed",
    ),
    "engine argument of a wrong type": (
        {"config": {"attention": {"engine_args": {"max_num_batched_tokens": "many"}}}},
        "config.attention.engine_args.max_num_batched_tokens: Invalid type. Expected: integer, given: string",
    ),
    "configuration value of a wrong type": (
        {"config": {"attention": {"max_num_seqs": "many"}}}, "config.attention.max_num_seqs: Invalid type",
    ),
    "configuration value out of range": (
        {"config": {"attention": {"kv_cache_gib": 0}}}, "config.attention.kv_cache_gib: Must be greater than 0",
    ),
    "configuration choice": (
        {"config": {"admission": {"mode": "strict"}}}, "config.admission.mode must be one of the following",
    ),
    "no replicas": ({"gateway": {"replicas": 0}}, "gateway.replicas: Must be greater than or equal to 1"),
    "choice": ({"tls": {"internal": {"mode": "on"}}}, "tls.internal.mode must be one of the following"),
    "no limits": (
        {"head": {"resources": {"limits": None}}}, "head.resources: limits is required",
    ),
    "no memory limit": (
        {"experts": {"groups": {"cpu": {"resources": {"limits": {"memory": None}}}}}}, "memory is required",
    ),
    "bad quantity": (
        {"head": {"resources": {"limits": {"memory": "4 GB"}}}}, "head.resources.limits.memory: Does not match pattern",
    ),
    "bad digest": ({"images": {"cpu": {"digest": "sha256:1"}}}, "images.cpu.digest: Does not match pattern"),
    "root": ({"runAsUser": 0}, "runAsUser: Must be greater than or equal to 1"),
    "unknown tenant key": (
        {"auth": {"tenants": [{"name": "a", "keys": [], "key": "x"}]}}, "auth.tenants.0: Additional property key",
    ),
    # Values that are each right and together wrong.
    "moving tag": ({"images": {"gpu": {"tag": "latest"}}, "config": {"attention": {"device": "cuda"}}, "attention": {
        "resources": {"limits": {"nvidia.com/gpu": 1}}}}, "images.gpu.tag is latest"),
    "relative model path": (
        {"config": {"model": {"path": "models/x"}}}, "config.model.path is models/x: give the absolute path",
    ),
    "model outside its volume": (
        {"model": {"source": "pvc", "pvc": {"claimName": "c"}}, "config": {"model": {"path": "/data/x"}}},
        "set config.model.path below model.mountPath",
    ),
    "no claim": ({"model": {"source": "pvc"}, "config": {"model": MODEL}}, "set model.pvc.claimName"),
    "no host path": ({"model": {"source": "hostPath"}, "config": {"model": MODEL}}, "set model.hostPath.path"),
    "no driver": ({"model": {"source": "csi"}, "config": {"model": MODEL}}, "set model.csi.driver"),
    "no fetcher": (
        {"model": {"source": "objectStore"}, "config": {"model": MODEL}}, "set model.objectStore.image",
    ),
    "moving fetcher": (
        {"model": {"source": "objectStore", "objectStore": {"image": "aws-cli", "command": ["x"]}},
         "config": {"model": MODEL}},
        "model.objectStore.image is aws-cli: name a version",
    ),
    "no certificate": (
        {"tls": {"gateway": {"mode": "secret"}}}, "set tls.gateway.secretName to a Secret with tls.crt and tls.key",
    ),
    "no issuer": ({"tls": {"internal": {"mode": "certManager"}}}, "set tls.internal.issuerRef.name"),
    "everybody and tenants": (
        {"auth": {"anonymous": True, "existingSecret": "x"}}, "auth.anonymous lets everybody in",
    ),
    "two places for tenants": (
        {"auth": {"existingSecret": "x", "tenants": [{"name": "a", "keys": []}]}}, "put those of auth.tenants into",
    ),
    "no workers": ({"experts": {"groups": {"cpu": {"workers": 0}}}}, "experts.groups has no workers"),
    "too few workers": (
        {"config": {"experts": {"replicas_per_expert": 3}}}, "config.experts.replicas_per_expert is 3, but",
    ),
    "parts of a CPU": (
        {"attention": {"resources": {"limits": {"cpu": "1500m"}}}}, "attention.resources.limits.cpu is 1500m",
    ),
    "GPU attention without GPUs": (
        {"config": {"attention": {"device": "cuda", "tensor_parallel_size": 8}}},
        "config.attention.tensor_parallel_size is 8, but attention.resources.limits has 0 nvidia.com/gpu",
    ),
    "GPU experts without GPUs": (
        {"experts": {"groups": {"cpu": {"device": "cuda"}}}}, "experts.groups.cpu.device is cuda, but",
    ),
    "CPU experts with GPUs": (
        {"experts": {"groups": {"cpu": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}}},
        "experts.groups.cpu.device is cpu: set the device to cuda",
    ),
    "replicas outside of the bounds": (
        {"attention": {"replicas": 9, "autoscaling": {"enabled": True}}}, "attention.replicas is 9, outside of",
    ),
    "replicas without pods": (
        {"attention": {"autoscaling": {"enabled": True}}}, "set ray.autoscaler.enabled too",
    ),
    "expert workers without pods": (
        {"experts": {"groups": {"cpu": {"autoscaling": {"enabled": True, "maxWorkers": 4}}}}},
        "experts.groups.cpu.autoscaling.enabled asks for workers that no pod is made for",
    ),
    "expert workers outside of the bounds": (
        {"ray": {"autoscaler": {"enabled": True}},
         "experts": {"groups": {"cpu": {"autoscaling": {"enabled": True, "maxWorkers": 1}}}}},
        "experts.groups.cpu.workers is 2, outside of experts.groups.cpu.autoscaling 1 to 1",
    ),
    "GPU workers by load": (
        {"ray": {"autoscaler": {"enabled": True}},
         "experts": {"groups": {"gpu": {"workers": 1, "device": "cuda",
                                        "autoscaling": {"enabled": True, "maxWorkers": 4},
                                        "resources": {"requests": {"cpu": 1, "memory": "1Gi"},
                                                      "limits": {"cpu": 1, "memory": "1Gi", "nvidia.com/gpu": 1}}}}}},
        "experts.groups.gpu.autoscaling.enabled needs workers that load and drop experts",
    ),
    "no redis": ({"ray": {"gcsFaultTolerance": {"enabled": True}}}, "needs ray.gcsFaultTolerance.redisAddress"),
    "no host": ({"ingress": {"rest": {"enabled": True}}}, "ingress.rest.enabled needs ingress.rest.host"),
    "no gateway": ({"gatewayApi": {"httpRoute": {"enabled": True}}}, "needs gatewayApi.parentRefs: name the Gateway"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    values, said = MISTAKES[mistake]
    with pytest.raises(HelmError) as refused:
        render(values)
    assert said in str(refused.value)


def derived_keys() -> dict[str, str]:
    text = (CHART / "templates" / "_config.tpl").read_text()
    block = text.split('define "deepsplit.derivedKeys" -}}\n')[1].split("{{- end")[0]
    return dict(line.split(": ", 1) for line in block.strip().splitlines())


@pytest.mark.parametrize("path", derived_keys())
def test_a_key_that_the_chart_sets_is_refused_with_its_place(path: str) -> None:
    *sections, key = path.split(".")
    model: Any = Config
    for name in sections:
        model = section_type(model.model_fields[name].annotation)
    field = model.model_fields[key]  # KeyError: a key that there is no more
    inner = section_type(field.annotation)
    value = field.get_default(call_default_factory=True) if inner is None else EXAMPLES.get(path, {})
    nested: Any = EXAMPLES.get(path, value)
    for name in reversed(path.split(".")):
        nested = {name: nested}
    with pytest.raises(HelmError) as refused:
        render({"config": nested})
    assert f"config.{path} cannot be set here: {derived_keys()[path]}" in str(refused.value)


EXAMPLES = {
    "ray.address": "auto", "ray.num_cpus": 4, "gateway.keys_file": "/k", "experts.shares": [1, 1],
    "attention.autoscaling": {"max_replicas": 2}, "experts.host": "0.0.0.0", "experts.max_per_node": 2,
    "experts.pools": [{"name": "a", "workers": 1}], "experts.autoscaling": {"max_workers": 4},
    "gateway.tls": {"cert_file": "/c", "key_file": "/k"},
    "internal_tls": {"cert_file": "/c", "key_file": "/k", "ca_file": "/a"},
    "monitoring.host": "0.0.0.0",
}  # fmt: skip


@pytest.mark.parametrize("mistake", ["unknown configuration key", "no claim"])
def test_helm_install_refuses_as_template_does(mistake: str, tmp_path: Path) -> None:
    values, said = MISTAKES[mistake]
    with FakeApi([], tmp_path) as api:
        options = ["--namespace", NAMESPACE, "--kubeconfig", api.kubeconfig, "--values", "-"]
        done = helm("install", RELEASE, CHART, *options, stdin=json.dumps(values))
    assert done.returncode != 0
    assert said in done.stderr
