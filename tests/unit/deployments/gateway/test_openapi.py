from __future__ import annotations

import json

from deployments.gateway.openapi import gateway_document

ENGINE = {
    "openapi": "3.1.0",
    "paths": {
        "/v1/completions": {"post": {"responses": {"200": {"$ref": "#/components/schemas/A"}}}},
        "/sleep": {"post": {"responses": {"200": {"$ref": "#/components/schemas/Hidden"}}}},
    },
    "components": {"schemas": {"A": {"p": {"$ref": "#/components/schemas/B"}}, "B": {}, "Hidden": {}}},
}


def test_only_what_is_served_and_what_that_refers_to() -> None:
    made = json.loads(gateway_document(json.dumps(ENGINE).encode(), "1.2", ["/v1/completions"], {"/health": "Alive."}))
    assert set(made["paths"]) == {"/v1/completions", "/health"}
    assert set(made["components"]["schemas"]) == {"A", "B"}
    assert made["info"]["version"] == "1.2"
    assert "default" in made["paths"]["/v1/completions"]["post"]["responses"]
