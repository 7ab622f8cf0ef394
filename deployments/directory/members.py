"""What workers, replicas, gateways and the directory tell each other. Plain data, no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from monitoring.discovery import ScrapeTarget
from routing.tokens.placement import Stamp
from routing.tokens.share import Share


@dataclass(frozen=True)
class AdmissionEndpoint:
    """Where the common admission of several gateways listens, and the token that it wants."""

    address: str  # host:port
    token: str = field(repr=False)


@dataclass(frozen=True)
class Assignment:
    """The slot that the directory gives to a new expert worker, and the slot's share: expert ids by layer."""

    slot: int
    experts: Share


@dataclass(frozen=True)
class Wish:
    """How many processes there are to be, as `deepsplit scale` or the experts' load said last. Workers and replicas
    repeat it, so that a new directory learns of it.
    """

    version: int  # grows with every wish
    experts: Mapping[str, int]  # workers, by pool
    attention: int


@dataclass(frozen=True)
class Heartbeat:
    """What an expert worker says of itself as soon as the one before was answered."""

    worker_id: str
    busy: float  # fraction of its time that it computed since the last one, 0 to 1
    speed: float  # work per second of computing, lately (`ExpertCompute.work`); 0: not known yet
    free_bytes: int  # of its host's memory
    heard: int  # number of the last orders that it heard; 0: none
    wish: Wish | None = None  # the last that it heard of


@dataclass(frozen=True)
class Orders:
    """What an expert worker is to do."""

    number: int  # tells them from others
    keeps: Share  # to hold now: it loads what it lacks and drops the rest
    share: Share  # of its slot; what it says of it is how a new directory learns of changes


@dataclass(frozen=True)
class HeartbeatReply:
    """The directory's answer to an expert worker's heartbeat."""

    known: bool  # False: the worker must register again
    stamp: Stamp  # of the newest published table; NO_TABLE: none
    orders: Orders | None = None  # None: those that the worker has heard
    wish: Wish | None = None  # None: as configured
    restart: bool = False  # the worker is to hand over, end, and have Serve start another process
    draining: bool = False  # the application ends: nobody needs the worker's experts any more


@dataclass(frozen=True)
class Demand:
    """What an attention replica passes on to Serve."""

    replicas: float | None  # attention replicas that all gateways' requests would fill; None while no gateway is known
    wish: Wish | None  # None: as configured


@dataclass(frozen=True)
class AttentionMember:
    """One attention replica, as it registers with every long poll."""

    replica_id: str
    pid: int
    node: str
    state: str  # starting, ready (it takes requests at `url`) or draining
    url: str = ""
    token: str = field(default="", repr=False)
    scrape: tuple[ScrapeTarget, ...] = ()  # its own, and its engine's once that listens
    cores: str = ""  # where its threads run, in words; empty where a GPU computes


@dataclass(frozen=True)
class GatewayMember:
    """One gateway replica, as it registers with every long poll."""

    gateway_id: str
    pid: int
    node: str
    open_requests: int
    in_flight: Mapping[str, int]  # requests that attention replicas have of this gateway, by replica id
    draining: bool
    scrape: ScrapeTarget
    demand: float = 0.0  # attention replicas that its requests would fill; 0 while the common admission decides


@dataclass(frozen=True)
class ReplicaEndpoint:
    """An attention replica that takes requests."""

    replica_id: str
    url: str  # http://host:port, or https
    token: str = field(repr=False)  # bearer token that its private port wants
    pid: int
    node: str
    leaving: bool = False  # its node is about to go: what it has may end, nothing new

    def authorization(self) -> dict[str, str]:
        """The header that its private port asks for."""
        return {"authorization": f"Bearer {self.token}"}


@dataclass(frozen=True)
class ClusterView:
    """What gateways and the common admission need to know of all other processes."""

    version: int  # grows with every change; never one of an earlier directory's
    endpoints: tuple[ReplicaEndpoint, ...]
    admission: AdmissionEndpoint | None
    draining: bool  # the whole application is about to stop
    targets: tuple[ScrapeTarget, ...] = ()  # every process that has metrics


@dataclass(frozen=True)
class EngineStats:
    """One engine's state and counters since its start. Token counters are 0 while MTP drafting is off."""

    running: int  # sequences in the engine's batch
    waiting: int  # sequences not yet in it
    kv_cache_usage: float  # fraction of the KV blocks in use, 0 to 1
    spec_draft_tokens: int
    spec_accepted_tokens: int
    generation_tokens: int
    prompt_tokens: int

    @property
    def spec_acceptance(self) -> float | None:
        """Fraction of the drafted tokens that the model accepted; None before the first draft."""
        return self.spec_accepted_tokens / self.spec_draft_tokens if self.spec_draft_tokens else None


@dataclass(frozen=True)
class ResponseHead:
    """Status and type of a replica's answer, whose body follows in chunks."""

    status: int
    content_type: str
