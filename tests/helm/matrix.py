"""Values that switch each option of the chart on and off, by name: (profile or None, values)."""

from __future__ import annotations

from typing import Any

Values = dict[str, Any]

_LIMITS = {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"cpu": 2, "memory": "2Gi"}}
_PLACED = {
    "nodeSelector": {"pool": "x"},
    "tolerations": [{"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
            }
        }
    },
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "podLabels": {"team": "serving"},
    "podAnnotations": {"note": "x"},
    "env": [{"name": "X", "value": "1"}],
    "volumes": [{"name": "extra", "configMap": {"name": "extra"}}],
    "volumeMounts": [{"name": "extra", "mountPath": "/extra", "readOnly": True}],
    "scratchSize": "1Gi",
    "shmSize": "1Gi",
}
_ON_VOLUME = {"config": {"model": {"path": "/models/x"}}}
_TENANT = {
    "name": "search", "keys": ["sha256:" + "0" * 64], "classes": ["interactive"], "requests_per_minute": 600,
    "weight": 2.5,
}  # fmt: skip

MATRIX: dict[str, tuple[str | None, Values]] = {
    "defaults": (None, {}),
    "demo": ("demo", {}),
    "gpu": ("deepseek-v3-gpu", {}),
    "hybrid": ("deepseek-v3-hybrid", {}),
    "placed": (None, {
        "head": _PLACED, "gateway": _PLACED, "attention": _PLACED,
        "experts": {"groups": {"cpu": _PLACED}}, "commonLabels": {"owner": "me"},
        "imagePullSecrets": [{"name": "pull"}], "imagePullPolicy": "Always", "fullnameOverride": "other",
    }),
    "digests": (None, {"images": {"cpu": {"digest": "sha256:" + "a" * 64}, "gpu": {"digest": "sha256:" + "b" * 64}}}),
    "pvc": (None, {"model": {"source": "pvc", "pvc": {"claimName": "m"}, "subPath": "v3"}} | _ON_VOLUME),
    "hostPath": (None, {"model": {"source": "hostPath", "hostPath": {"path": "/data"}}} | _ON_VOLUME),
    "csi": (None, {"model": {"source": "csi", "csi": {
        "driver": "blob.csi.example", "volumeAttributes": {"bucket": "m"}, "secretName": "s"}}} | _ON_VOLUME),
    "objectStore": (None, {"model": {"source": "objectStore", "objectStore": {
        "image": "store-client:1.2", "command": ["fetch", "all"], "metadataCommand": ["fetch", "json"],
        "env": [{"name": "A", "value": "b"}], "envFrom": [{"secretRef": {"name": "store"}}], "size": "900Gi"}}}
        | _ON_VOLUME),
    "anonymous": (None, {"auth": {"anonymous": True}}),
    "tenants": (None, {"auth": {"tenants": [_TENANT]}}),
    "existing secrets": (None, {
        "auth": {"existingSecret": "mine", "operatorKeySecret": "mine-key"},
        "tls": {"gateway": {"mode": "secret", "secretName": "a"}, "internal": {"mode": "secret", "secretName": "b"}},
        "ray": {"auth": {"existingSecret": "token"}},
    }),
    "cert-manager": (None, {"tls": {
        use: {"mode": "certManager", "issuerRef": {"name": "ours", "kind": "ClusterIssuer"}}
        for use in ("gateway", "internal")}}),
    "no tls": (None, {"tls": {"gateway": {"mode": "disabled"}, "internal": {"mode": "disabled"}}}),
    "more names": (None, {"tls": {"gateway": {"hosts": ["llm.example.org"]}}}),
    "autoscaling": (None, {
        "ray": {"autoscaler": {"enabled": True}},
        "attention": {"replicas": 2, "autoscaling": {"enabled": True, "minReplicas": 1, "maxReplicas": 8}},
    }),
    "experts by load": (None, {
        "ray": {"autoscaler": {"enabled": True}},
        "experts": {"groups": {"cpu": {"autoscaling": {"enabled": True, "maxWorkers": 6, "targetBusy": 0.5,
                                                   "downscaleDelaySeconds": 60}}}},
    }),
    "redis": (None, {"ray": {"gcsFaultTolerance": {
        "enabled": True, "redisAddress": "redis.data:6379", "redisPassword": {"secretName": "r"}}}}),
    "redis without password": (None, {"ray": {"gcsFaultTolerance": {"enabled": True, "redisAddress": "r:6379"}}}),
    "ray without token": (None, {"ray": {"auth": {"mode": "disabled"}}}),
    "upgrade in place": (None, {"upgrade": {"type": "None", "oldClusterDeletionDelaySeconds": 5}}),
    "load balancer": (None, {"service": {
        "type": "LoadBalancer", "annotations": {"a": "b"}, "loadBalancerSourceRanges": ["198.51.100.0/24"],
        "rest": {"port": 443}, "grpc": {"port": 8443}}}),
    "node port": (None, {"service": {"type": "NodePort"}}),
    "ingress": (None, {"ingress": {
        api: {"enabled": True, "className": "nginx", "host": f"{api}.example.org", "tlsSecretName": "t",
              "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "600"}}
        for api in ("rest", "grpc")}}),
    "routes": (None, {"gatewayApi": {
        "parentRefs": [{"name": "edge", "namespace": "infra", "sectionName": "https"}],
        "httpRoute": {"enabled": True, "hostnames": ["llm.example.org"]},
        "grpcRoute": {"enabled": "auto", "hostnames": ["grpc.example.org"]}}}),
    "policies": (None, {"networkPolicy": {
        "clients": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "apps"}}}],
        "dashboardFrom": [{"podSelector": {"matchLabels": {"app": "ops"}}}], "prometheus": [],
        "kubernetesApi": [{"ipBlock": {"cidr": "192.0.2.1/32"}}], "redis": [{"podSelector": {}}],
        "extraEgress": [{"ports": [{"port": 123, "protocol": "UDP"}]}]},
        "ray": {"autoscaler": {"enabled": True},
                "gcsFaultTolerance": {"enabled": True, "redisAddress": "redis:6379"}}}),
    "no policies": (None, {"networkPolicy": {"enabled": False}}),
    "budgets": (None, {"podDisruptionBudgets": {"minAvailable": {"gateway": 2, "attention": 1, "experts": 2}}}),
    "no budgets": (None, {"podDisruptionBudgets": {"enabled": False}, "topologySpread": {"enabled": False}}),
    "monitoring forced": (None, {"monitoring": {
        "labels": {"release": "prometheus"}, "interval": "30s",
        **{kind: {"enabled": True} for kind in ("podMonitor", "scrapeConfig", "prometheusRule")}}}),
    "no monitoring": (None, {"monitoring": {
        **{kind: {"enabled": False} for kind in ("podMonitor", "scrapeConfig", "prometheusRule", "dashboards")}}}),
    "two expert groups": (None, {"experts": {"groups": {
        "cpu": {"workers": 2, "share": 1}, "large": {"workers": 1, "share": 2.5, "resources": _LIMITS}}}}),
    "GPU and CPU experts": ("deepseek-v3-gpu", {
        "config": {"experts": {"replicas_per_expert": 2}},
        "experts": {"groups": {"cpu": {"workers": 4, "share": 3, "resources": _LIMITS}}},
    }),
}  # fmt: skip
