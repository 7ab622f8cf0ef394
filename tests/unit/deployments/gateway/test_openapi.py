"""The OpenAPI document, and what the server says of its versions."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.routing import Route

from cluster.errors import NoCapacity, Plane, Reason
from deployments.gateway.openapi import ServerDescription, gateway_document
from deployments.gateway.paths import POST_PATHS
from tests.unit.deployments.gateway.gateway_world import FakePool
from tests.unit.deployments.gateway.rest.rest_world import RestWorld

ENGINE = {
    "openapi": "3.1.0",
    "paths": {
        "/v1/completions": {"post": {"responses": {"200": {"$ref": "#/components/schemas/A"}}}},
        "/sleep": {"post": {"responses": {"200": {"$ref": "#/components/schemas/Hidden"}}}},
        "/v1/models": {"get": {"responses": {"200": {"description": "the engine's"}}}},
    },
    "components": {"schemas": {"A": {"p": {"$ref": "#/components/schemas/B"}}, "B": {}, "Hidden": {}}},
}


def document(engine: object, served: tuple[str, ...]) -> dict:
    return json.loads(gateway_document(json.dumps(engine).encode(), "1.2", served))


def test_only_what_is_served_with_all_that_it_refers_to() -> None:
    made = document(ENGINE, ("/v1/completions",))
    assert "/v1/completions" in made["paths"]
    assert "/sleep" not in made["paths"]
    assert {"A", "B"} <= set(made["components"]["schemas"])
    assert made["info"]["version"] == "1.2"
    assert "default" in made["paths"]["/v1/completions"]["post"]["responses"]
    assert "the engine's" not in json.dumps(made["paths"]["/v1/models"])


def test_every_route_is_described_and_nothing_else() -> None:
    engine = {"openapi": "3.1.0", "paths": {path: {"post": {"responses": {}}} for path in POST_PATHS}}
    routes = {
        route.path.replace(":path}", "}"): (route.methods or set()) - {"HEAD"}
        for route in RestWorld(FakePool()).app.routes
        if isinstance(route, Route)
    }
    described = document(engine, POST_PATHS)["paths"]
    assert {path: {method.upper() for method in methods} for path, methods in described.items()} == routes


def test_names_in_paths_are_parameters() -> None:
    (parameter,) = document(ENGINE, ())["paths"]["/v1/models/{model}"]["get"]["parameters"]
    assert (parameter["name"], parameter["in"], parameter["required"]) == ("model", "path", True)


def test_the_engine_is_asked_once_it_is_there() -> None:
    asked: list[str] = []

    async def scenario() -> None:
        there = False

        async def page(path: str) -> bytes:
            asked.append(path)
            if not there:
                raise NoCapacity("nobody", retry_after_s=5.0, plane=Plane.ATTENTION, reason=Reason.NO_REPLICA)
            return json.dumps(ENGINE | {"version": "0.9"}).encode()

        description = ServerDescription("1.2", ("/v1/completions",), page)
        with pytest.raises(NoCapacity):
            await description.openapi()
        assert await description.versions() == {"version": "1.2"}
        there = True
        for _ in range(2):
            assert json.loads(await description.openapi())["info"]["title"] == "deepsplit"
            assert await description.versions() == {"version": "1.2", "vllm": "0.9"}

    asyncio.run(scenario())
    assert asked == ["/openapi.json", "/version"] * 2
