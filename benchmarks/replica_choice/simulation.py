"""Simulates replicas of `benchmarks.fakes.service_model` behind a policy that says which one gets a request.

Discrete events in virtual time: nothing here depends on this machine's speed, and every policy sees the same arrivals.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from benchmarks.fakes.service_model import ServiceModel, SimulatedEngine, SimulatedSequence
from benchmarks.fakes.tokens import block_hashes, tokenize
from routing.requests.prefix_index import prefix_hashes
from routing.requests.replica_choice import Candidate, ReplicaChoice
from routing.requests.request import Ask, Priority, ReplicaLoad, Tenant

LOAD_INTERVAL_S = 0.25  # how old a replica's word of itself can be
_TENANT = Tenant("simulated")


@dataclass(eq=False)
class Request:
    """One arrival; its job is made anew for each run."""

    ask: Ask
    blocks: Sequence[int]
    arrived_s: float


@dataclass(eq=False)
class Running:
    """A request in a replica."""

    request: Request
    job: SimulatedSequence
    uncached_tokens: int  # as the policy believed
    first_s: float | None = None
    ended_s: float = 0.0


@dataclass(eq=False)
class Replica:
    """One engine, and what a gateway knows of it."""

    name: str
    engine: SimulatedEngine
    load: ReplicaLoad
    running: dict[SimulatedSequence, Running] = field(default_factory=dict)
    busy: bool = False

    def candidate(self) -> Candidate:
        """As admission keeps it: its own requests are known at once, the replica's own word is older."""
        inside = self.running.values()
        return Candidate(
            self.load,
            len(inside),
            sum(one.uncached_tokens for one in inside if one.first_s is None),
            sum(one.job.prompt_tokens + one.job.new_tokens for one in inside),
        )


class Policy(Protocol):
    """None: nobody now; asked again when a request ends. Otherwise the number of a replica."""

    def choose(self, ask: Ask, replicas: Sequence[Replica]) -> int | None: ...


class RoundRobin:
    """Each in turn."""

    def __init__(self) -> None:
        self._turn = count()

    def choose(self, ask: Ask, replicas: Sequence[Replica]) -> int:
        return next(self._turn) % len(replicas)


class PowerOfTwo:
    """Ray Serve's PowerOfTwoChoicesRequestRouter: of two replicas at random, the one with fewer ongoing requests.

    As Ray Serve LLM runs it: with max_ongoing_requests at its default of 1e9, every replica accepts.
    """

    def __init__(self, rng: random.Random) -> None:
        self._random = rng

    def choose(self, ask: Ask, replicas: Sequence[Replica]) -> int:
        pair = self._random.sample(range(len(replicas)), 2)
        return min(pair, key=lambda number: len(replicas[number].running))


class Ours:
    """`routing.requests.replica_choice`, unchanged."""

    def __init__(self, choice: ReplicaChoice) -> None:
        self.choice = choice

    def choose(self, ask: Ask, replicas: Sequence[Replica]) -> int | None:
        room = ask.prompt_tokens + ask.max_new_tokens
        candidates = [replica.candidate() for replica in replicas]
        candidates = [one for one in candidates if one.has_room(ask.sequences, room, one.load.max_num_seqs)]
        picked = self.choice.best(ask, candidates)
        if picked is None:
            return None
        return next(number for number, replica in enumerate(replicas) if replica.name == picked)


def make_request(number: int, prompt: bytes, new_tokens: int, arrived_s: float) -> Request:
    """A request with this prompt."""
    ids = tokenize(prompt)
    ask = Ask(
        f"{number}", _TENANT, Priority.INTERACTIVE, len(ids), new_tokens, 1, prefix_hashes(prompt), None
    )  # fmt: skip
    return Request(ask, block_hashes(ids), arrived_s)


@dataclass(frozen=True)
class Outcome:
    """One run. Times in seconds."""

    ttft_s: list[float]
    tpot_s: list[float]
    hit_ratio: float  # of prompt tokens
    tokens_per_s: float  # generated


class ReplicaSimulation:
    """One policy over one list of requests."""

    def __init__(self, policy: Policy, model: ServiceModel, replicas: int) -> None:
        self._policy = policy
        self._replicas = [
            Replica(f"r{number}", SimulatedEngine(model), ReplicaLoad(f"r{number}", model.slots, model.kv_cache_tokens))
            for number in range(replicas)
        ]
        self._events: list[tuple[float, int, Replica | Request | None]] = []
        self._order = count()
        self._queue: deque[Request] = deque()
        self._done: list[Running] = []

    def open_loop(self, requests: Sequence[Request]) -> Outcome:
        """Each at its time; the first and last tenth are not counted."""
        for request in requests:
            self._at(request.arrived_s, request)
        self._run(None)
        self._done.sort(key=lambda one: one.request.arrived_s)
        tenth = len(self._done) // 10
        return self._outcome(self._done[tenth:-tenth])

    def closed_loop(self, requests: Sequence[Request], at_once: int) -> Outcome:
        """Always `at_once` in flight: throughput at saturation. The first quarter is not counted."""
        upcoming = deque(requests)
        for _ in range(at_once):
            self._at(0.0, upcoming.popleft())
        self._run(upcoming)
        return self._outcome(self._done[len(self._done) // 4 :])

    def _outcome(self, counted: Sequence[Running]) -> Outcome:
        ttft, tpot = [], []
        for one in counted:
            assert one.first_s is not None
            ttft.append(one.first_s - one.request.arrived_s)
            tpot.append((one.ended_s - one.first_s) / max(1, one.job.generated - 1))
        hits = sum(one.job.cached_tokens for one in counted) / sum(one.job.prompt_tokens for one in counted)
        ends = [one.ended_s for one in counted]
        return Outcome(ttft, tpot, hits, sum(one.job.generated for one in counted) / (max(ends) - min(ends)))

    def _at(self, time_s: float, what: Replica | Request | None) -> None:
        heapq.heappush(self._events, (time_s, next(self._order), what))

    def _run(self, upcoming: deque[Request] | None) -> None:
        self._at(LOAD_INTERVAL_S, None)
        while self._events:
            now_s, _, what = heapq.heappop(self._events)
            if isinstance(what, Request):
                what.arrived_s = now_s
                self._queue.append(what)
                self._place(now_s)
            elif isinstance(what, Replica):
                ended = self._end_step(what, now_s)
                self._begin_step(what, now_s)
                if ended:
                    self._place(now_s)
                if upcoming is not None:
                    for _ in range(ended):
                        if not upcoming:
                            return  # the tail would not be saturated
                        self._at(now_s, upcoming.popleft())
            else:
                for replica in self._replicas:
                    engine, model = replica.engine, replica.engine.model
                    replica.load = ReplicaLoad(
                        replica.name, model.slots, model.kv_cache_tokens, running=len(engine.running),
                        waiting=len(engine.waiting), kv_cache_usage=engine.cache.usage,
                    )  # fmt: skip
                if self._events:
                    self._at(now_s + LOAD_INTERVAL_S, None)

    def _place(self, now_s: float) -> None:
        while self._queue:
            request = self._queue[0]
            number = self._policy.choose(request.ask, self._replicas)
            if number is None:
                return
            self._queue.popleft()
            replica = self._replicas[number]
            uncached = request.ask.prompt_tokens
            if isinstance(self._policy, Ours):
                uncached -= self._policy.choice.cached_tokens(request.ask, replica.name)
                self._policy.choice.placed(request.ask, replica.load)
            job = SimulatedSequence(request.blocks, request.ask.prompt_tokens, request.ask.max_new_tokens)
            replica.running[job] = Running(request, job, uncached)
            replica.engine.add(job)
            self._begin_step(replica, now_s)

    def _begin_step(self, replica: Replica, now_s: float) -> None:
        if not replica.busy and (length_s := replica.engine.begin_step()) is not None:
            replica.busy = True
            self._at(now_s + length_s, replica)

    def _end_step(self, replica: Replica, now_s: float) -> int:
        replica.busy = False
        ended = 0
        for job in replica.engine.end_step():
            one = replica.running[job]
            if one.first_s is None:
                one.first_s = now_s
            if job.generated >= job.new_tokens:
                one.ended_s = now_s
                self._done.append(replica.running.pop(job))
                ended += 1
        return ended
