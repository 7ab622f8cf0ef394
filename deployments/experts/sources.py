"""Experts come from the checkpoint and from workers that hold them, at the same time: each source takes the next expert
when it is done with one, so the faster it is the more it loads, and what one cannot give another one does.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from cluster.errors import CheckpointError
from deployments.experts.weights import LayerExperts
from routing.tokens.expert_pieces import ExpertPeer, PeerAway
from routing.tokens.placement import WorkerEndpoint
from routing.tokens.share import Share

_MOST_PEERS = 4  # each is one more thread, and one of them may well have more than its network brings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Wanted:
    """An expert to load, and its place: index `local` of `experts`."""

    layer: int
    expert: int  # global id
    experts: LayerExperts
    local: int


class NotThere(Exception):
    """A worker does not hold this expert (any more); it may hold others."""


_OF_ONE_EXPERT = (NotThere, CheckpointError, OSError)


class Source(Protocol):
    """Fills places."""

    name: str
    threads: int  # as many experts at a time
    from_end: bool  # takes the last experts first, to meet the others as late as possible

    def why_not(self, wanted: Wanted) -> Exception | None:
        """Return why it cannot have an expert, as far as is known before; None if it may."""

    def load(self, wanted: Wanted) -> None:
        """Fill its place. Raises NotThere, CheckpointError or OSError if it cannot, PeerAway if it can nothing more."""


class Peer:
    """A worker that holds some of the experts in the same layout."""

    threads, from_end = 1, True

    def __init__(self, link: ExpertPeer, holds: Share) -> None:
        self.name = link.address
        self._link = link
        self._holds = {layer: frozenset(ids) for layer, ids in holds.items()}

    def why_not(self, wanted: Wanted) -> Exception | None:
        """Follow the placement table."""
        held = wanted.expert in self._holds.get(wanted.layer, ())
        return None if held else NotThere(f"{self.name} does not hold it")

    def load(self, wanted: Wanted) -> None:
        """Copy it."""
        if not self._link.fetch(wanted.layer, wanted.expert, wanted.experts.parts_of(wanted.local)):
            raise NotThere(f"{self.name} does not hold it any more")


def most_useful(holders: Sequence[WorkerEndpoint], share: Share) -> list[WorkerEndpoint]:
    """Return the holders that have most of `share`, _MOST_PEERS at most; of equal ones, any."""
    def has(holder: WorkerEndpoint) -> int:
        return sum(len({*ids} & {*holder.experts.get(layer, ())}) for layer, ids in share.items())

    order = sorted(random.sample(holders, len(holders)), key=has, reverse=True)
    return [holder for holder in order[:_MOST_PEERS] if has(holder)]


def load_all(wanted: Sequence[Wanted], sources: Sequence[Source], on_loaded: Callable[[Wanted, Source], None]) -> None:
    """Load all experts, `wanted` in the order that suits the checkpoint, or raise the error of one that no source can
    give. `on_loaded` is called by one thread at a time.
    """
    line = _Line(wanted, sources, on_loaded)
    turns = [source for source in sources for _ in range(source.threads)]
    with ThreadPoolExecutor(len(turns), "load", torch.set_num_threads, (1,)) as pool:
        for ended in [pool.submit(_work, line, source) for source in turns]:
            ended.result()
    if line.error is not None:
        raise line.error


def _work(line: _Line, source: Source) -> None:
    while (one := line.take(source)) is not None:
        try:
            source.load(one)
            line.done(one, source)
        except (PeerAway, *_OF_ONE_EXPERT) as error:
            line.give_back(one, source, error)
        except Exception as error:  # a defect of ours: the other threads are to end too
            line.stop(error)


class _Line:
    """The experts that wait for a source. Thread-safe."""

    def __init__(
        self, wanted: Sequence[Wanted], sources: Sequence[Source], on_loaded: Callable[[Wanted, Source], None]
    ) -> None:
        self._on_loaded = on_loaded
        self._changed = threading.Condition()  # of all below
        self._waiting = list(wanted)
        self._sources = list(sources)  # that still give
        self._refused: dict[tuple[Wanted, Source], Exception] = {}
        self._loading = self._given_back = 0
        self.error: Exception | None = None  # with it everything ends
        for one in wanted:
            self._check(one)

    def take(self, source: Source) -> Wanted | None:
        """Return the next expert for a source; waits while others may still give one back. None: there will be none."""
        looked = -1  # at all that wait, when so many had been given back: only those may be new to this source
        with self._changed:
            while self.error is None and source in self._sources and (self._waiting or self._loading):
                if looked != self._given_back:
                    looked = self._given_back
                    order = range(len(self._waiting))
                    for at in reversed(order) if source.from_end else order:
                        if self._why_not(source, self._waiting[at]) is None:
                            self._loading += 1
                            return self._waiting.pop(at)
                self._changed.wait()
            return None

    def done(self, one: Wanted, source: Source) -> None:
        """An expert is in its place."""
        with self._changed:
            self._on_loaded(one, source)
            self._loading -= 1
            self._changed.notify_all()

    def give_back(self, one: Wanted, source: Source, error: Exception) -> None:
        """A source could not load this expert."""
        with self._changed:
            self._loading -= 1
            self._given_back += 1
            self._waiting.insert(0, one)
            self._refused[one, source] = error
            if isinstance(error, PeerAway) and source in self._sources:
                logger.warning("experts are not loaded from %s any more: %s", source.name, error)
                self._sources.remove(source)
                for waiting in self._waiting:
                    self._check(waiting)
            self._check(one)
            self._changed.notify_all()

    def stop(self, error: Exception) -> None:
        """Have everything end."""
        with self._changed:
            self.error = self.error or error
            self._changed.notify_all()

    def _why_not(self, source: Source, one: Wanted) -> Exception | None:
        return self._refused.get((one, source)) or source.why_not(one)

    def _check(self, one: Wanted) -> None:
        """Everything ends if nobody can give this expert."""
        reasons = [self._why_not(source, one) for source in self._sources]
        if self.error is None and None not in reasons:
            # What is wrong with the checkpoint is what an operator can mend.
            self.error = next((why for why in reasons if not isinstance(why, NotThere)), reasons[0])
