"""A client's view of a running cluster, which `helm test` runs:

    python -m deployments.gateway.smoke_test --rest URL --grpc HOST:PORT

Makes real requests, says what it saw, and fails at the first thing that is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import grpc
import httpx

from deployments.protos.deepsplit.v1 import inference_pb2 as pb
from deployments.protos.deepsplit.v1 import inference_pb2_grpc as api

ROLES = frozenset({"gateway", "attention", "experts", "directory"})
WRONG_KEY = "ds-this-key-was-never-given-out"
_PROMPT = "def fibonacci(n):"
_MAX_TOKENS = 8
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Client:
    """Where the cluster is, and who asks. `key` is None where there are no keys."""

    rest: str
    grpc_target: str
    key: str | None
    authorities: Path | None  # PEM; the system's own if None

    def http(self, key: str | None) -> httpx.Client:
        """A REST client with `key`."""
        context = ssl.create_default_context(cafile=self.authorities)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.rest, verify=context, headers=headers, timeout=_TIMEOUT_S, trust_env=False)

    def channel(self) -> grpc.Channel:
        """A gRPC channel, over TLS exactly if REST is."""
        if not self.rest.startswith("https:"):
            return grpc.insecure_channel(self.grpc_target)
        pem = None if self.authorities is None else self.authorities.read_bytes()
        return grpc.secure_channel(self.grpc_target, grpc.ssl_channel_credentials(pem))


class Failed(Exception):
    """What was not as it must be."""


def check(client: Client, say: Callable[[str], None]) -> None:
    """All of it. Raises Failed, or httpx's and grpc's own errors."""
    with client.http(client.key) as http:
        model = _model(http)
        say(f"models: {model}")
        say(f"REST: {_rest_stream(http, model)!r}")
        say(f"discovery: {', '.join(sorted(_roles(http)))}")
    with client.channel() as channel:
        say(f"gRPC: {_grpc_stream(api.InferenceStub(channel), model, client.key)!r}")
        say(f"refusals: {_refusals(client, api.InferenceStub(channel))}")


def _model(http: httpx.Client) -> str:
    listed = [str(entry["id"]) for entry in _ok(http.get("/v1/models")).json()["data"]]
    return listed[0] if listed else _fail("/v1/models lists none")


def _rest_stream(http: httpx.Client, model: str) -> str:
    body = {"model": model, "prompt": _PROMPT, "max_tokens": _MAX_TOKENS, "temperature": 0, "stream": True}
    text, done = "", False
    with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            _ok(answer)
        for line in answer.iter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                done = True
            elif line.startswith("data: "):
                event = json.loads(data)
                if "error" in event:
                    _fail(f"the stream broke off: {event['error']}")
                text += "".join(choice["text"] for choice in event["choices"])
    return text if done and text else _fail(f"the REST stream ended with {text!r}, without [DONE]")


def _grpc_stream(stub: api.InferenceStub, model: str, key: str | None) -> str:
    sampling = pb.Sampling(max_tokens=_MAX_TOKENS, temperature=0)
    request = pb.CompletionRequest(model=model, text=_PROMPT, sampling=sampling)
    chunks = stub.CompleteStream(request, timeout=_TIMEOUT_S, metadata=_metadata(key))
    text = "".join(choice.text for chunk in chunks for choice in chunk.choices)
    return text or _fail("the gRPC stream brought no text")


def _refusals(client: Client, stub: api.InferenceStub) -> str:
    """A wrong key where there are keys, an unknown model elsewhere: both APIs must say so in their own form."""
    key, model = (WRONG_KEY, "") if client.key is not None else (None, "no-such-model")
    status, code, wanted = (401, "unauthenticated", "UNAUTHENTICATED")
    if client.key is None:
        status, code, wanted = (404, "model_not_found", "NOT_FOUND")
    with client.http(key) as http:
        answer = http.post("/v1/completions", json={"model": model, "prompt": _PROMPT, "max_tokens": 1})
    error = answer.json().get("error", {})
    if (answer.status_code, error.get("code")) != (status, code) or not error.get("message"):
        _fail(f"REST must refuse with {status} and code {code}, but says {answer.status_code}: {answer.text[:500]}")
    request = pb.CompletionRequest(model=model, text=_PROMPT, sampling=pb.Sampling(max_tokens=1))
    try:
        stub.Complete(request, timeout=_TIMEOUT_S, metadata=_metadata(key))
    except grpc.RpcError as refused:
        if refused.code().name != wanted or not refused.details():
            _fail(f"gRPC must refuse with {wanted}, but says {refused.code().name}: {refused.details()}")
    else:
        _fail(f"gRPC must refuse with {wanted}, but answers")
    return f"{status} {code}, {wanted}"


def _roles(http: httpx.Client) -> set[str]:
    """Roles in the service discovery for Prometheus, every one with a target."""
    groups = _ok(http.get("/sd/prometheus")).json()
    found = {group["labels"]["role"] for group in groups if group["targets"]}
    missing = ROLES - found
    if missing:
        _fail(f"/sd/prometheus lists no {', '.join(sorted(missing))}, only {', '.join(sorted(found))}")
    return found


def _metadata(key: str | None) -> list[tuple[str, str]]:
    return [] if key is None else [("authorization", f"Bearer {key}")]


def _ok(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        _fail(f"{answer.request.url.path} answers {answer.status_code}: {answer.text[:500]}")
    return answer


def _fail(message: str) -> NoReturn:
    raise Failed(message)


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 1 and one line if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--rest", required=True, help="base URL, such as https://deepsplit:8000")
    parser.add_argument("--grpc", required=True, help="host:port")
    parser.add_argument("--key-file", type=Path, help="file with an operator's API key")
    parser.add_argument("--ca-file", type=Path, help="authorities, PEM; the system's own if it is not there")
    options = parser.parse_args(arguments)
    key = None if options.key_file is None else options.key_file.read_text().strip()
    authorities = options.ca_file if options.ca_file is not None and options.ca_file.exists() else None
    started = time.monotonic()
    try:
        check(Client(options.rest, options.grpc, key, authorities), lambda line: print(line, flush=True))
    except (Failed, httpx.HTTPError, grpc.RpcError) as error:
        details = error.details() if isinstance(error, grpc.RpcError) else error
        sys.exit(f"failed: {type(error).__name__}: {details}")
    print(f"all well after {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
