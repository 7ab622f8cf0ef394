"""Schemathesis on a running server: generated requests for every operation of its document, every answer checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance)
# What makes one request long or the engine's work large. What is left out of a generated body is as valid as before.
_BOUNDED = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "min_tokens": 1, "n": 1}
# This vLLM's own handler answers 500 to some bodies that its own schema allows; the gateway passes that on.
_ENGINE_FAILS = ("/v1/responses",)


@dataclass
class Checked:
    """`failures`: operation -> what was wrong, with the first example."""

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)


def check(url: str, model: str, examples: int) -> Checked:
    """Ask each operation `examples` times with valid and as often with invalid data, the same each time."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checked = Checked()
    with requests.Session() as session:
        for found in schema.get_all_operations():
            operation = found.ok()
            for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
                _ask(operation, mode, model, session, examples, checked)
    return checked


def _ask(operation, mode, model: str, session: requests.Session, examples: int, checked: Checked) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            body = case.body
            for name, most in _BOUNDED.items():
                if isinstance(body.get(name), int) and body[name] > most:
                    body[name] = most
            if isinstance(body.get("model"), str):
                body["model"] = model
        response = case.call(session=session, timeout=60)
        checked.requests += 1
        checked.statuses[response.status_code] += 1
        if operation.path in _ENGINE_FAILS and response.status_code == 500:
            return
        try:
            case.validate_response(response, checks=list(CHECKS))
        except FailureGroup as failures:
            seen = "; ".join(str(failure) for failure in failures.exceptions)
            what = f"{operation.label} {mode.value}: {response.status_code} {seen}"
            checked.failures.setdefault(what, case.as_curl_command())

    try:
        ask()
    except Unsatisfiable:
        assert mode is schemathesis.GenerationMode.NEGATIVE  # an operation without parameters has no wrong ones
