"""A fake for the Kubernetes API: helm's real `lookup` reads from it what an earlier rendering has made.

It answers discovery and GETs of Secrets, and knows no releases: it shows what helm and the chart do with what they
find, not what Kubernetes does with what it gets.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helm.chart import NAMESPACE, Manifest, of_kind

_SECRETS = f"/api/v1/namespaces/{NAMESPACE}/secrets/"
_DISCOVERY = {
    "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList", "groupVersion": "v1",
        "resources": [{"name": "secrets", "kind": "Secret", "namespaced": True, "verbs": ["get", "list"]}],
    },
    # Where helm looks for earlier releases.
    _SECRETS.rstrip("/"): {"kind": "SecretList", "apiVersion": "v1", "metadata": {}, "items": []},
}  # fmt: skip


class FakeApi:
    """Serves the Secrets among `objects` on loopback; `kubeconfig` is a file for helm."""

    def __init__(self, objects: Sequence[Manifest], folder: Path) -> None:
        stored = {secret["metadata"]["name"]: _as_stored(secret) for secret in of_kind(objects, "Secret")}
        self.asked: list[str] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0].rstrip("/")
                found: object = _DISCOVERY.get(path)
                if path.startswith(_SECRETS):
                    asked.append(path.removeprefix(_SECRETS))
                    found = stored.get(asked[-1])
                body = json.dumps(found or {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404})
                self.send_response(200 if found else 404)
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(
            json.dumps(
                {
                    "apiVersion": "v1", "kind": "Config", "current-context": "x",
                    "clusters": [
                        {"name": "x", "cluster": {"server": f"http://127.0.0.1:{self._server.server_address[1]}"}}
                    ],
                    "users": [{"name": "x", "user": {}}],
                    "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x"}}],
                }
            )
        )  # fmt: skip

    def __enter__(self) -> FakeApi:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def options(self) -> list[str]:
        """What makes helm ask here."""
        return ["--dry-run=server", "--kubeconfig", str(self.kubeconfig)]


def _as_stored(secret: Manifest) -> Manifest:
    """Kubernetes turns `stringData` into `data`."""
    made = {key: value for key, value in secret.items() if key != "stringData"}
    texts = {key: base64.b64encode(text.encode()).decode() for key, text in secret.get("stringData", {}).items()}
    return made | {"data": secret.get("data", {}) | texts}
