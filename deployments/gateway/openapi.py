"""What this gateway serves: the OpenAPI document, of the engine's own description and ours, and versions."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import msgspec

from cluster.errors import NoCapacity

_TEXT = {"type": ["string", "null"]}
_ERROR = {
    "description": "An error in OpenAI's shape. 429 and 503 say in `Retry-After` when to ask again.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": _TEXT,
                            # The engine's own errors have the status here, the gateway's a word.
                            "code": {"type": ["string", "integer", "null"]},
                            "plane": {"type": "string", "description": "What limits."},
                            "reason": {"type": "string"},
                        },
                    }
                },
            }
        }
    },
}


_OWN_PATHS = {
    "/health": "This process is alive.",
    "/ping": "This process is alive.",
    "/ready": "Whether a request would find a replica, per model; 503 if not.",
    "/version": "Version of deepsplit, and of the engine once a replica is there.",
    "/openapi.json": "This document.",
    "/v1/models": "The model, under each of its names.",
    "/v1/models/{model}": "One model, by any of its names.",
    "/metrics": "Prometheus metrics of this gateway replica; for operators.",
    "/sd/prometheus": "Prometheus HTTP service discovery of every process of the cluster; for operators.",
    "/v1/deepsplit/status": "State of both planes, of the engine and of admission.",
}


class ServerDescription:
    """Describes the server. The engine is asked once, when somebody first wants to know."""

    def __init__(self, version: str, served: Collection[str], get: Callable[[str], Awaitable[bytes]]) -> None:
        """`served`: paths that go to the engine. `get` fetches a page of any replica. Raises NoCapacity."""
        self._version = version
        self._served = served
        self._get = get
        self._document: bytes | None = None
        self._engine: str | None = None

    async def openapi(self) -> bytes:
        """Returns the OpenAPI document. Raises NoCapacity."""
        if self._document is None:
            self._document = gateway_document(await self._get("/openapi.json"), self._version, self._served)
        return self._document

    async def versions(self) -> Mapping[str, str]:
        """Returns deepsplit's version as `version`, and the engine's as `vllm` if any replica is there."""
        if self._engine is None:
            try:
                self._engine = str(msgspec.json.decode(await self._get("/version"))["version"])
            except NoCapacity:
                return {"version": self._version}
        return {"version": self._version, "vllm": self._engine}


def gateway_document(engine: bytes, version: str, served: Collection[str]) -> bytes:
    """Returns the document. `engine`: the replica's own; `served`: paths taken from it."""
    theirs: dict[str, Any] = msgspec.json.decode(engine)
    paths: dict[str, Any] = {path: {"get": _own(path, summary)} for path, summary in _OWN_PATHS.items()}
    for path, operations in theirs["paths"].items():
        if path in served:
            paths[path] = operations
            for operation in operations.values():
                answers = operation.get("responses", {})
                # Every error may be the gateway's, and the engine's own have the same shape.
                good = {status: answer for status, answer in answers.items() if status.startswith("2")}
                operation["responses"] = good | {"default": _ERROR}
    document = {
        "openapi": theirs["openapi"],
        "info": {"title": "deepsplit", "version": version},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": theirs.get("components", {}).get("schemas", {}),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def _own(path: str, summary: str) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    answers = {"200": {"description": "OK"}, "default": _ERROR}
    return {"summary": summary, "parameters": parameters, "responses": answers}
