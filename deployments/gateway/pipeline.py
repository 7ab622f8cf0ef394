"""One request's way through the gateway, the same for every protocol:

authenticate (`Pipeline.open`) -> read (`body.py`) -> outline (`outline.py`) -> lease (`lease.py`: admission and the one
end) -> attempts on replicas (`upstream/attempts.py`) -> write (the protocol's own).
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass

import msgspec

from cluster.config import GatewayConfig
from cluster.errors import DeepsplitError, PermissionDenied, RequestError
from deployments.admission.waiting_room import WaitingRoom
from deployments.gateway.detokenizer import ModelTokenizer
from deployments.gateway.head import Head
from deployments.gateway.lease import BodyMemory, Lease, new_ticket
from deployments.gateway.limit_headers import rate_limit_headers
from deployments.gateway.meter import RequestMeter
from deployments.gateway.models import may_use, no_model
from deployments.gateway.open_requests import OpenRequests, Session
from deployments.gateway.outline import Outline, certain_prompts, outline
from deployments.gateway.paths import MESSAGES
from deployments.gateway.upstream.attempts import Attempts
from deployments.gateway.upstream.pool import ReplicaPool, longest_context
from routing.requests.prediction.prompt_size import PromptSize
from routing.requests.prefix_index import prefix_hashes
from routing.requests.request import Ask, Grant, Priority, Tenant
from routing.requests.tenants import TenantsFile

UNKNOWN_BOUND = 1024  # new tokens of a sequence, while no replica has said how long its context is

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """An answer whose head is there. The chunks of its body follow: per token for streams (SSE)."""

    status: int
    content_type: str
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]


class Pipeline:
    """Handles all of a gateway's requests. Belongs to one event loop."""

    def __init__(
        self,
        models: tuple[str, ...],
        config: GatewayConfig,
        tenants: TenantsFile,
        room: WaitingRoom,
        pool: ReplicaPool,
        tokenizer: ModelTokenizer,
        meter: RequestMeter,
        log_bodies: bool = False,
    ) -> None:
        """`models`: the model's name, then its further ones. `log_bodies`: request bodies go to the log, as debug
        lines.
        """
        self._models = models
        self._config = config
        self._tenants = tenants
        self._room = room
        self._pool = pool
        self._tokenizer = tokenizer
        self._meter = meter
        self._log_bodies = log_bodies
        self._prompt_size = PromptSize()
        self._memory = BodyMemory(config.max_bodies_mib * 2**20)
        self.open_requests = OpenRequests(config)

    def ready(self) -> Mapping[str, bool]:
        """Returns by model name whether a request would find a replica now; all False while draining."""
        ready = not self.open_requests.draining and bool(self._pool.loads())
        return dict.fromkeys(self._models, ready)

    def identify(self, key: str | None) -> Tenant:
        """Returns the key's tenant. Raises Unauthenticated."""
        return self._tenants.current().identify(key)

    # --- authenticate ---

    @asynccontextmanager
    async def open(self, head: Head, session: Session | None = None) -> AsyncIterator[Lease]:
        """Gives a request that has just come its lease, for as long as it lives. Nothing of its body has been read.

        `session`: the call that it came on, which has been let in already. Raises DeepsplitError: of those that refuse
        strangers and too many at once, so that they cannot make the gateway hold their bodies.
        """
        lease = self._lease(head)
        try:
            async with lease.bounded(self._config.request_timeout_s):
                lease.tenant = self.identify(head.key) if session is None else session.tenant
                if (total_s := head.total_s()) is not None:
                    lease.shorten(total_s)
                if session is None:
                    self.open_requests.check()
                with self.open_requests.holding(lease):
                    yield lease
        except BaseException as error:
            lease.end(error)
            raise
        lease.end(None)

    @contextmanager
    def session(self, head: Head) -> Iterator[Session]:
        """Lets in a call that brings one request after another. One that is refused counts as a request: raises
        Unauthenticated, Draining, Overloaded, QuotaExceeded.
        """
        lease = self._lease(head)
        with ExitStack() as stack:
            try:
                lease.tenant = self.identify(head.key)
                session = stack.enter_context(self.open_requests.session(lease.tenant))
            except DeepsplitError as error:
                lease.end(error)
                raise
            yield session

    def _lease(self, head: Head) -> Lease:
        return Lease(head, self._room, self._memory, self._prompt_size, self._meter)

    # --- outline ---

    async def outline(self, lease: Lease, body: bytes) -> Outline:
        """Returns what the request asks for. Raises ClientError: not valid, not allowed, or too large for ever."""
        if self._log_bodies:
            fields = {"request_id": lease.head.request_id, "body": body.decode(errors="replace")}
            logger.debug("request body", extra={"fields": fields})
        outlined = outline(lease.head.path, body)
        self._check_model(lease.tenant, outlined.model)
        if outlined.sequences > self._config.max_sequences:
            raise RequestError(
                f"{outlined.sequences} sequences in one request (n times prompts); the most is "
                f"{self._config.max_sequences} (gateway.max_sequences)"
            )
        await self._check_prompt(lease.head.path, outlined)
        return outlined

    def _check_model(self, tenant: Tenant, model: str | None) -> None:
        if model is not None and model not in self._models:
            raise no_model(model, self._models)
        if not may_use(tenant, self._models):
            raise PermissionDenied(
                f"tenant {tenant.name} may not use {self._models[0]!r}: see `models` in the keys file"
            )

    async def _check_prompt(self, path: str, outlined: Outline) -> None:
        """Refuses a prompt that no replica can hold: that is the request's fault, and no overload."""
        context = longest_context(self._pool.loads())
        own = self._config.max_prompt_tokens
        if not outlined.sequences or (context is None and own is None) or outlined.truncate_prompt_tokens == -1:
            return
        most = min(tokens for tokens in (own, None if context is None else context - 1) if tokens is not None)
        tokens, texts = certain_prompts(path, outlined)
        for text in texts:
            if tokens <= most < len(text):  # a token is at least a byte
                tokens = max(tokens, await self._tokenizer.count(text, most))
        if outlined.truncate_prompt_tokens is not None:
            tokens = min(tokens, outlined.truncate_prompt_tokens)
        if tokens <= most:
            return
        if context is not None and tokens >= context:
            raise RequestError(
                f"this model's maximum context length is {context} tokens, and the prompt has {tokens} or more: "
                "shorten it"
            )
        raise RequestError(f"the prompt has {tokens} tokens, this server's limit is {own} (gateway.max_prompt_tokens)")

    # --- admission, attempts ---

    @asynccontextmanager
    async def run(self, lease: Lease, outlined: Outline, body: bytes) -> AsyncIterator[Answer]:
        """Has the request answered by a replica; leaving early aborts it. Raises DeepsplitError, with a chunk too."""
        if outlined.model is None and lease.head.path == MESSAGES:  # where the engine takes no empty name
            body = msgspec.json.encode({**outlined.fields, "model": self._models[0]})
        grant = await lease.admit(self._ask(lease, outlined))
        attempts = Attempts(lease, outlined, body, self._pool, self._tokenizer.decode, self._config.max_resends)
        async with aclosing(attempts.run()) as chunks:
            first, head = await anext(chunks), attempts.head
            lease.status = head.status
            yield Answer(head.status, head.content_type, self._headers(lease, grant), _chained(first, chunks))

    def _ask(self, lease: Lease, outlined: Outline) -> Ask:
        cut, context = outlined.truncate_prompt_tokens, longest_context(self._pool.loads())
        prompt_tokens = lease.estimate(len(outlined.prompt_text), outlined.prompt_ids, cut is not None)
        if cut is not None and cut >= 0:
            prompt_tokens = min(prompt_tokens, cut * outlined.prompts)
        bound = outlined.max_new_tokens
        if context is not None:
            prompt_tokens = min(prompt_tokens, context * outlined.prompts)  # more, the engine refuses or cuts
            left = max(1, context - prompt_tokens // max(1, outlined.prompts))
            bound = left if bound is None else min(bound, left)
        return Ask(
            ticket=new_ticket(),
            tenant=lease.tenant,
            priority=_priority(lease.head.priority(), lease.tenant),
            prompt_tokens=prompt_tokens,
            max_new_tokens=(UNKNOWN_BOUND if bound is None else bound) * outlined.sequences,
            streamed=outlined.stream,
            bound_stated=outlined.max_new_tokens is not None,
            sequences=outlined.sequences,
            prefix_hashes=prefix_hashes(outlined.prompt_text),
            deadline_s=min((s for s in (lease.head.ttft_s(), lease.head.total_s()) if s is not None), default=None),
        )

    def _headers(self, lease: Lease, grant: Grant) -> dict[str, str]:
        headers = rate_limit_headers(grant.limits) | {"x-request-id": lease.head.request_id}
        if grant.predicted_ttft_s is not None:
            headers["x-deepsplit-predicted-ttft-s"] = f"{grant.predicted_ttft_s:.3f}"
        if any(load.degraded for load in self._pool.loads() if load.replica_id == lease.replica_id):
            headers["x-deepsplit-degraded"] = "true"
        return headers


async def _chained(first: bytes, others: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in others:
        yield chunk


def _priority(asked: str | None, tenant: Tenant) -> Priority:
    if asked is None:
        return tenant.default_class
    by_label = {priority.label: priority for priority in Priority}
    if asked not in by_label:
        raise RequestError(f"unknown priority class {asked!r}: one of {', '.join(by_label)}")
    if by_label[asked] not in tenant.classes:
        raise PermissionDenied(f"tenant {tenant.name} may not use the class {asked!r}: see `classes` in the keys file")
    return by_label[asked]
