"""The gateway's `Door`: tenant, bounds, admission, relay; draining at the end."""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from cluster.config import GatewayConfig
from cluster.errors import (
    Draining,
    ModelNotFound,
    NoCapacity,
    Overloaded,
    PermissionDenied,
    Plane,
    Reason,
    ReplicaUnavailable,
    RequestError,
    RequestTimeout,
    RequestTooLarge,
)
from deployments.admission.waiting_room import WaitingRoom
from deployments.gateway.deadline import Deadline
from deployments.gateway.door import Answer, Call
from deployments.gateway.limit_headers import rate_limit_headers
from deployments.gateway.meter import RequestMeter, RequestMeters
from deployments.gateway.open_answer import open_answer
from deployments.gateway.outline import Peek, model_of, parse, peek
from deployments.gateway.upstream.attempts import Relay, Replicas
from deployments.gateway.upstream.continuation import Continuation
from routing.requests.prediction.prompt_size import PromptSize
from routing.requests.prefix_index import prefix_hashes
from routing.requests.request import Ask, Priority, Tenant
from routing.requests.tenants import TenantsFile

GENERATES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
PASSED_ON = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})
_RETRY_DRAINING_S = 2.0
_RETRY_NO_REPLICA_S = 5.0
_RETRY_FULL_S = 1.0
_JITTER = 0.5  # those refused together are told different times, up to this share longer
_DRAIN_POLL_S = 0.05

logger = logging.getLogger(__name__)


class Tokens(Protocol):
    """The model's tokenizer, for the rare request that needs it here; see `detokenizer.ModelTokens`."""

    async def count(self, text: bytes) -> int: ...
    async def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


class GatewayDoor:
    """See `deployments.gateway.door.Door`."""

    def __init__(
        self,
        model: str,
        config: GatewayConfig,
        tenants: TenantsFile,
        gate: WaitingRoom,
        replicas: Replicas,
        text: Tokens,
        meters: RequestMeters,
        log_bodies: bool = False,
    ) -> None:
        """`log_bodies`: request bodies go to the log, as debug lines."""
        self._model = model
        self._config = config
        self._tenants = tenants
        self._gate = gate
        self._replicas = replicas
        self._text = text
        self._meters = meters
        self._log_bodies = log_bodies
        self._prompt_size = PromptSize()
        self._open: set[Deadline] = set()
        self._arriving = 0  # requests whose bodies are being read
        self._draining = False

    def ready(self) -> Mapping[str, bool]:
        """See Door."""
        return {self._model: not self._draining and bool(self._replicas.loads())}

    @property
    def open_requests(self) -> int:
        """Requests in flight, waiting ones included."""
        return len(self._open)

    def identify(self, key: str | None) -> Tenant:
        """Whose key it is. Raises Unauthenticated."""
        return self._tenants.current().identify(key)

    @contextmanager
    def arriving(self, path: str, key: str | None, request_id: str) -> Iterator[None]:
        """See Door."""
        meter = self._meters.request(request_id, self._model, path, path in GENERATES)
        try:
            meter.identified(self.identify(key))
            self._check_open(len(self._open) + self._arriving)
        except BaseException as error:
            meter.end(error, 0)
            raise
        self._arriving += 1
        try:
            yield
        finally:
            self._arriving -= 1

    async def answer(self, call: Call) -> Answer:
        """See Door."""
        meter = self._meters.request(call.request_id, self._model, call.path, call.path in GENERATES)
        try:
            return await self._answer(call, meter)
        except BaseException as error:
            meter.end(error, 0)
            raise

    async def _answer(self, call: Call, meter: RequestMeter) -> Answer:
        tenant = self.identify(call.key)
        meter.identified(tenant)
        self._check_open(len(self._open))
        if len(call.body) > self._config.max_body_mib * 2**20:
            raise RequestTooLarge(f"the request is larger than {self._config.max_body_mib} MiB, this server's limit")
        if self._log_bodies:
            fields = {"request_id": call.request_id, "body": call.body.decode(errors="replace")}
            logger.debug("request body", extra={"fields": fields})
        deadline = self._deadline(call)
        self._open.add(deadline)
        try:
            if call.path in GENERATES:
                return await self._generate(call, tenant, deadline, meter)
            return await self._pass_on(call, tenant, deadline, meter)
        except BaseException:
            self._open.discard(deadline)
            raise

    def _check_open(self, held: int) -> None:
        if self._draining:
            raise Draining(
                "this gateway is stopping: send the request again", retry_after_s=_jittered(_RETRY_DRAINING_S),
                plane=Plane.GATEWAY, reason=Reason.DRAINING,
            )  # fmt: skip
        if held >= self._config.max_streams:
            raise Overloaded(
                f"this gateway holds {self._config.max_streams} requests, its limit (gateway.max_streams)",
                retry_after_s=_jittered(_RETRY_FULL_S), plane=Plane.GATEWAY, reason=Reason.MAX_STREAMS,
            )  # fmt: skip

    async def drain(self, grace_s: float) -> None:
        """Refuse what is new, let what runs end for `grace_s` seconds, then end it with an error."""
        self._draining = True
        loop = asyncio.get_running_loop()
        until = loop.time() + grace_s
        while self._open and loop.time() < until:
            await asyncio.sleep(_DRAIN_POLL_S)
        for deadline in list(self._open):
            deadline.cut(
                Draining(
                    f"the gateway stopped and this request was not done within {grace_s:g} s: send it again",
                    retry_after_s=_jittered(_RETRY_DRAINING_S), plane=Plane.GATEWAY, reason=Reason.DRAINING,
                )
            )  # fmt: skip
        until = loop.time() + 1.0
        while self._open and loop.time() < until:
            await asyncio.sleep(_DRAIN_POLL_S)

    # --- generation ---

    async def _generate(self, call: Call, tenant: Tenant, deadline: Deadline, meter: RequestMeter) -> Answer:
        outline = peek(call.path, parse(call.body))
        self._check_model(tenant, outline.model)
        ask = self._ask(call, tenant, outline)
        await self._check_prompt(outline)
        tap = Continuation(call.path, outline.fields, call.body, self._text.decode)
        relay = Relay(
            tap, self._gate, self._replicas, call.request_id, self._config.max_resends, meter, ask.prompt_tokens
        )
        meter.waits(ask.priority)
        grant = await deadline.wait(self._gate.admit(ask))
        meter.admitted(grant)

        def ended(error: BaseException | None, status: int) -> None:
            self._open.discard(deadline)
            if isinstance(error, GeneratorExit) and tap.finished:  # a client that had it all and went
                error = None
            meter.end(error, status, tap.prompt_tokens or 0, tap.generated_tokens)
            if tap.prompt_tokens is not None and not outline.prompt_ids:
                self._prompt_size.learn(len(outline.prompt_text), tap.prompt_tokens)

        headers = rate_limit_headers(grant.limits) | {"x-request-id": call.request_id}
        if grant.predicted_ttft_s is not None:  # `admission.mode: off` predicts nothing
            headers["x-deepsplit-predicted-ttft-s"] = f"{grant.predicted_ttft_s:.3f}"
        answer = await open_answer(relay.run(grant), deadline, headers, ended)
        if any(load.degraded for load in self._replicas.loads() if load.replica_id == relay.replica_id):
            return replace(answer, headers={**answer.headers, "x-deepsplit-degraded": "true"})
        return answer

    def _ask(self, call: Call, tenant: Tenant, outline: Peek) -> Ask:
        priority = _priority(call.priority, tenant)
        return Ask(
            ticket=uuid.uuid4().hex,
            tenant=tenant,
            priority=priority,
            prompt_tokens=self._prompt_size.estimate(len(outline.prompt_text), outline.prompt_ids),
            max_new_tokens=outline.max_new_tokens,
            sequences=outline.sequences,
            prefix_hashes=prefix_hashes(outline.prompt_text),
            deadline_s=min((s for s in (call.ttft_s, call.timeout_s) if s is not None), default=None),
        )

    async def _check_prompt(self, outline: Peek) -> None:
        most = self._config.max_prompt_tokens
        if most is None:
            return
        tokens = outline.prompt_ids
        if not tokens and len(outline.prompt_text) > most:  # a token is at least a byte
            tokens = await self._text.count(outline.prompt_text)
        if tokens > most:
            raise RequestError(f"the prompt has {tokens} tokens, this server's limit is {most}")

    # --- all else ---

    async def _pass_on(self, call: Call, tenant: Tenant, deadline: Deadline, meter: RequestMeter) -> Answer:
        if call.body:
            self._check_model(tenant, model_of(parse(call.body)))
        headers = {"x-request-id": call.request_id}
        tried: set[str] = set()

        def ended(error: BaseException | None, status: int) -> None:
            self._open.discard(deadline)
            meter.end(error, status)

        while True:
            left = [load.replica_id for load in self._replicas.loads() if load.replica_id not in tried]
            if not left or len(tried) > self._config.max_resends:
                raise NoCapacity(
                    "no attention replica is ready", retry_after_s=_jittered(_RETRY_NO_REPLICA_S),
                    plane=Plane.ATTENTION, reason=Reason.NO_REPLICA,
                )  # fmt: skip
            replica_id = random.choice(left)
            meter.sent(replica_id)
            answer = self._replicas.send(replica_id, call.method, call.path, call.body, call.request_id)
            try:
                return await open_answer(answer, deadline, headers, ended)
            except ReplicaUnavailable as error:
                fields = {"request_id": call.request_id}
                logger.warning("a request goes on elsewhere: %s", error, extra={"fields": fields})
                tried.add(replica_id)

    def _check_model(self, tenant: Tenant, model: str | None) -> None:
        if model is not None and model != self._model:
            raise ModelNotFound(f"the model {model!r} does not exist; this server has {self._model!r}")
        if tenant.models is not None and self._model not in tenant.models:
            raise PermissionDenied(f"tenant {tenant.name} may not use {self._model!r}: see `models` in the keys file")

    def _deadline(self, call: Call) -> Deadline:
        seconds = min(self._config.request_timeout_s, call.timeout_s or self._config.request_timeout_s)
        at_s = asyncio.get_running_loop().time() + seconds
        return Deadline(at_s, RequestTimeout(f"the request took longer than {seconds:g} s and was aborted"))


def _jittered(seconds: float) -> float:
    return seconds * (1 + _JITTER * random.random())


def _priority(asked: str | None, tenant: Tenant) -> Priority:
    if asked is None:
        return tenant.default_class
    by_label = {priority.label: priority for priority in Priority}
    if asked not in by_label:
        raise RequestError(f"unknown priority class {asked!r}: one of {', '.join(by_label)}")
    if by_label[asked] not in tenant.classes:
        raise PermissionDenied(f"tenant {tenant.name} may not use the class {asked!r}: see `classes` in the keys file")
    return by_label[asked]
