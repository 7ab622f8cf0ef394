"""What the gateway, admission and replica choice say to each other about one generation request. No behaviour."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from cluster.errors import RateLimits, Reason


class Priority(IntEnum):
    """Priority classes; a lower value goes first."""

    SYSTEM = 0
    INTERACTIVE = 1
    BATCH = 2

    @property
    def label(self) -> str:
        """The name in keys files, headers and metrics."""
        return self.name.lower()


@dataclass(frozen=True)
class Tenant:
    """Whose request it is, and what that tenant may do. None: no such limit."""

    name: str
    classes: tuple[Priority, ...] = (Priority.INTERACTIVE, Priority.BATCH)
    default_class: Priority = Priority.INTERACTIVE
    models: tuple[str, ...] | None = None
    weight: float = 1.0  # part of the cluster relative to other tenants of the same class
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # prompt plus generated
    max_streams: int | None = None  # in flight at once, in the whole cluster
    operator: bool = False  # may read the cluster's metrics and service discovery


@dataclass(frozen=True)
class Ask:
    """One request for generation, as admission sees it."""

    ticket: str  # unique in the cluster
    tenant: Tenant
    priority: Priority
    prompt_tokens: int  # estimated from the text, exact for token ids
    max_new_tokens: int  # upper bound over all of the request's sequences
    sequences: int  # decode slots that it takes (n, or several prompts); 0: it generates nothing (tokenize)
    prefix_hashes: tuple[int, ...]  # one per full block of the prompt, each covering all before it, root first
    deadline_s: float | None  # how long the client waits for the first token; None: the class's objective only
    streamed: bool = True  # False: nobody sees how far the answer is before it is whole
    bound_stated: bool = True  # False: the client named no bound, and `max_new_tokens` is what the engine would allow


@dataclass(frozen=True)
class Grant:
    """Leave to send a request to one replica."""

    ticket: str
    replica_id: str
    predicted_ttft_s: float | None  # when the request came, from then; None: nothing finite was predicted
    would_refuse: Reason | None = None  # shadow mode: the reason it would have been refused for
    limits: RateLimits | None = None


@dataclass(frozen=True)
class Usage:
    """What a request really cost when it ended, however it ended."""

    prompt_tokens: int
    generated_tokens: int
    complete: bool = True  # it came to its own end; False: it was cut off, and its length says only that it was longer


@dataclass(frozen=True)
class ReplicaLoad:
    """What one attention replica last said of itself."""

    replica_id: str
    max_num_seqs: int  # decode slots
    kv_cache_tokens: int  # capacity of its KV cache
    max_model_len: int = 0  # longest prompt plus completion, in tokens; 0: not known
    running: int = 0  # sequences in the engine's batch
    waiting: int = 0  # sequences not yet in it
    kv_cache_usage: float = 0.0  # part of the KV blocks in use, 0 to 1
    experts_queue_s: float = 0.0  # mean time that a step's rows wait in expert workers' queues, summed over layers
    degraded: bool = False  # rows went without some of their experts lately (dispatch.on_uncovered: degrade)
