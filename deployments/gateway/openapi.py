"""The OpenAPI document of what this gateway serves: the engine's own description of those paths, and ours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

_REFERENCE = re.compile(r"#/components/schemas/([^\"/]+)")
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


def gateway_document(engine: bytes, version: str, served: Collection[str], own: Mapping[str, str]) -> bytes:
    """The document. `engine`: the replica's own; `served`: paths taken from it; `own`: GET path -> what it tells."""
    theirs: dict[str, Any] = msgspec.json.decode(engine)
    paths: dict[str, Any] = {
        path: {"get": {"summary": summary, "responses": {"200": {"description": "OK"}, "default": _ERROR}}}
        for path, summary in own.items()
    }
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
            "schemas": _reachable(paths, theirs.get("components", {}).get("schemas", {})),
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
    return msgspec.json.encode(document)


def _reachable(paths: Mapping[str, Any], schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The schemas that `paths` refer to, directly or not."""
    found: dict[str, Any] = {}
    fresh = set(_REFERENCE.findall(msgspec.json.encode(paths).decode()))
    while fresh:
        found |= {name: schemas[name] for name in fresh if name in schemas}
        text = msgspec.json.encode([schemas[name] for name in fresh if name in schemas]).decode()
        fresh = set(_REFERENCE.findall(text)) - set(found)
    return found
