"""One seed's world: workers, a directory, clients that dispatch, faults, and what must hold of all of them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch

from cluster.config import DispatchConfig
from cluster.plan.shares import split_shares
from routing.tokens.client import ExpertClient, ExpertShape
from routing.tokens.dispatching.watchdog import Watchdog
from routing.tokens.placement import NO_TABLE, PlacementFile, PlacementTable, Stamp
from routing.tokens.share import Share
from tests.simulation.directory import VirtualDirectory
from tests.simulation.events import Timeline
from tests.simulation.network import Network, VirtualLink
from tests.simulation.worker import HIDDEN, LOAD_S, VirtualWorker, factor

LAYERS, TOP_K = (3, 4), 3
FAULTS_S, HEALED_S = 12.0, 20.0  # how long there are faults, and then none


class _TableInMemory(PlacementFile):
    """The follower writes it, the client reads it."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere"))

    def adopt(self, table: PlacementTable) -> None:
        """Replace the table by one that went through its bytes, as over the wire."""
        self._table = PlacementTable.decode(table.encoded)

    def current(self) -> PlacementTable:
        """As the real one."""
        return self._table


class _ChoresOnTime(Watchdog):
    """The client's watchdog as events."""

    def __init__(self, line: Timeline, chores: Sequence[Callable[[], object]], interval_s: float) -> None:
        self._off = False

        def run() -> None:
            for chore in chores:
                if not self._off:
                    chore()

        line.every(interval_s, run)

    def stop(self) -> None:
        """No more of them."""
        self._off = True


class VirtualClient:
    """An attention process: the real ExpertClient, and the follower that brings it tables."""

    def __init__(self, world: World, name: str, on_uncovered: str) -> None:
        self.world, self.name = world, name
        self._file, self._seen = _TableInMemory(), NO_TABLE
        self.open = False
        limits = {"call_timeout_s": 8.0, "dispatch_timeout_s": 80.0, "uncovered_timeout_s": 70.0}
        settings = DispatchConfig.model_validate(limits | {"on_uncovered": on_uncovered})
        self.client = ExpertClient(
            settings, ExpertShape("m", HIDDEN, world.experts), self._file, torch.float32, torch.float32,
            link_class=lambda address, *_: VirtualLink(world.network, name, address),
            clock=world.line.clock, random=Random(world.random.random()),
            start_watchdog=lambda interval_s, chores: _ChoresOnTime(world.line, chores, interval_s),
        )  # fmt: skip
        world.line.every(0.1, self._poll)
        world.line.after(1.0, self._dispatch_when_covered)

    @property
    def table(self) -> PlacementTable:
        """That the client uses."""
        plane = self.client._placement._plane
        return self._file.current() if plane is None else plane.table

    def _poll(self) -> None:
        world = self.world
        directory = world.directory_of(self.name)
        seen = self.table.stamp if self._seen != NO_TABLE else NO_TABLE

        def answer() -> None:
            table = directory.poll(self.name, seen) if directory.alive else None
            if table is not None:
                world.network.carry("directory", self.name, lambda: self._adopt(table))

        world.network.carry(self.name, "directory", answer)

    def _adopt(self, table: PlacementTable) -> None:
        stamp, before = table.stamp, self._file.current().stamp
        if stamp.incarnation == before.incarnation and stamp.n <= before.n:
            return  # a doubled or late answer; the real follower has one call at a time
        self._seen = stamp
        self._file.adopt(table)

    def _dispatch_when_covered(self) -> None:
        if self.table.covers(LAYERS, self.world.experts):
            self._dispatch()
        else:
            self.world.line.after(0.2, self._dispatch_when_covered)

    def _dispatch(self) -> None:
        world, random = self.world, self.world.random
        if world.line.now_s >= world.ends_s:
            return
        rows = random.choice((1, 1, 2, 5, 20))
        layer = random.choice(LAYERS)
        numbers = np.random.default_rng(random.getrandbits(32))
        every_TE = np.tile(np.arange(world.experts), (rows, 1))
        ids_TK = torch.from_numpy(numbers.permuted(every_TE, axis=1)[:, :TOP_K].copy())
        weights_TK = torch.from_numpy(numbers.integers(1, 5, (rows, TOP_K)).astype(np.float32))
        hidden_TH = torch.from_numpy(numbers.integers(1, 10, (rows, HIDDEN)).astype(np.float32))
        self.open = True
        dispatch = self.client.begin(layer, hidden_TH, ids_TK, weights_TK)
        world.line.sleep(random.choice((0.0, 0.0, 0.003)))  # the shared expert
        output_TH = self.client.finish(dispatch)
        self.open = False
        world.note(dispatch.stopwatch.sample.retries, dispatch.stopwatch.sample.uncovered_wait_s)
        if dispatch.degraded_rows:
            world.happened["degraded"] += 1
            assert torch.isfinite(output_TH).all()
        else:
            scale_T = torch.from_numpy((weights_TK.numpy() * factor(layer, ids_TK.numpy())).sum(axis=1)).float()
            assert torch.equal(output_TH, hidden_TH * scale_T[:, None]), "a pair is missing, doubled, or of another row"
        world.dispatches += 1
        world.line.after(random.expovariate(1 / 0.15), self._dispatch)


class World:
    """Everything of one seed."""

    def __init__(self, seed: int) -> None:
        logging.getLogger("routing.tokens").setLevel(logging.CRITICAL)
        self.random, self.line = Random(seed), Timeline()
        random = self.random
        self.network = Network(self.line, random)
        self.happened: Counter[str] = Counter()
        self.published: dict[Stamp, bytes] = {}
        self.dispatches = 0
        self.experts = random.choice((6, 8, 12))
        replicas = random.choice((1, 1, 2))
        self.slots = random.randint(max(2, replicas), 4)
        held = split_shares(self.experts, [1.0] * self.slots, replicas)
        self._shares: list[Share] = [dict.fromkeys(LAYERS, ids) for ids in held]
        self._names = iter(f"w{number}" for number in range(10_000))
        self._incarnations = iter(random.sample(range(1, 1 << 40), 1000))
        self.faults_end_s = self.line.now_s + FAULTS_S
        self.ends_s = self.faults_end_s + HEALED_S
        self.clients: list[VirtualClient] = []
        self.directory = VirtualDirectory(self, self._shares, next(self._incarnations))
        self._old_directory: tuple[VirtualDirectory, set[str]] | None = None  # and who still talks to it
        self.workers: list[VirtualWorker] = []
        for slot in range(self.slots):
            self.line.after(0.1 * slot, self._start_worker)
        degrade = random.random() < 0.15
        for number in range(random.choice((1, 2))):
            self.clients.append(VirtualClient(self, f"c{number}", "degrade" if degrade else "wait"))
        for _ in range(random.randint(1, 8)):
            self.line.after(2.0 + random.random() * (FAULTS_S - 2.0), self._fault)
        self.line.after(FAULTS_S, self._heal)

    def run(self) -> None:
        """Let it happen. Raises AssertionError, or what a dispatch raised."""
        self.line.wait_for(lambda: False, FAULTS_S + HEALED_S)
        ended = self.line.wait_for(lambda: not any(client.open for client in self.clients), 100.0)
        assert ended, "a dispatch never ends"
        table = self.directory.membership.table()
        assert table is not None
        assert table.covers(LAYERS, self.experts), "an expert has no holder although all is well"
        for client in self.clients:
            assert client.table.stamp == table.stamp, f"{client.name} has {client.table.stamp}, not {table.stamp}"
        assert self.dispatches > 0

    def note(self, retries: Sequence[str], uncovered_wait_s: float) -> None:
        """Count what a dispatch met."""
        self.happened.update(retries)
        self.happened["uncovered wait"] += uncovered_wait_s > 0

    def directory_of(self, name: str) -> VirtualDirectory:
        """The directory that somebody talks to."""
        if self._old_directory is not None and name in self._old_directory[1]:
            return self._old_directory[0]
        return self.directory

    # --- workers' lives ---

    def _start_worker(self) -> None:
        """A new process, as Serve starts one; it asks for a slot until there is one."""
        name, node = next(self._names), f"n{self.random.randint(0, 2)}"

        def join() -> None:
            directory = self.directory
            slot = directory.membership.join(name, 1, node, directory.now_s) if directory.alive else None
            if slot is None:
                if sum(worker.alive for worker in self.workers) < self.slots:
                    self.line.after(0.25, join)
                return
            share = directory.membership.share(slot)
            worker = VirtualWorker(name, slot, node, share, self.line, self.random)
            worker.held = {}
            self.workers.append(worker)
            self.line.every(1.0, lambda: self._beat(worker))
            self.line.after(LOAD_S * (1 + self.random.random()), lambda: worker.do(lambda: self._be_ready(worker)))

        join()

    def _be_ready(self, worker: VirtualWorker) -> None:
        worker.held, worker.ready = dict(worker.share), True
        self.network.workers[worker.address] = worker
        directory = self.directory_of(worker.name)
        directory.ask(worker, lambda: directory.register(worker))

    def _beat(self, worker: VirtualWorker) -> None:
        if worker.alive and not worker.stopped:
            directory = self.directory_of(worker.name)
            directory.ask(worker, lambda: directory.heartbeat(worker))

    def kill(self, worker: VirtualWorker) -> None:
        """Its process ends, and Serve starts another if there are to be as many."""
        if not worker.alive:
            return
        worker.alive = False
        self.workers.remove(worker)
        if self.random.random() < 0.7:  # the directory's own connection tells it at once
            self.line.after(0.02, lambda: self.directory.membership.lose(worker.name))
        if len(self.workers) < self.slots:
            self.line.after(0.5 + 2 * self.random.random(), self._start_worker)

    # --- faults ---

    def _fault(self) -> None:
        kinds = (self._kill, self._stop, self._slow, self._fail, self._busy, self._cut, self._lossy, self._jump,
                 self._lose_directory, self._two_directories, self._leave, self._resize, self._reshare)  # fmt: skip
        kind = self.random.choice(kinds)
        ready = [worker for worker in self.workers if worker.ready]
        if ready and self.line.now_s < self.faults_end_s:
            self.happened[kind.__name__.strip("_")] += 1
            kind(self.random.choice(ready))

    def _while(self, least_s: float, most_s: float, undo: Callable[[], None]) -> None:
        self.line.after(least_s + self.random.random() * (most_s - least_s), undo)

    def _kill(self, worker: VirtualWorker) -> None:
        self.kill(worker)

    def _stop(self, worker: VirtualWorker) -> None:
        worker.stopped = True
        self._while(0.2, 9.0, worker.go_on)

    def _slow(self, worker: VirtualWorker) -> None:
        worker.slowness = 300.0
        self._while(1.0, 6.0, lambda: setattr(worker, "slowness", 1.0))

    def _fail(self, worker: VirtualWorker) -> None:
        worker.failures = self.random.randint(1, 2)

    def _busy(self, worker: VirtualWorker) -> None:
        worker.busy_until_s = self.line.now_s + self.random.random()

    def _cut(self, worker: VirtualWorker) -> None:
        other = self.random.choice(["directory", *(client.name for client in self.clients)])
        ways = self.random.choice(([(worker.name, other)], [(other, worker.name)],
                                   [(worker.name, other), (other, worker.name)]))  # fmt: skip
        self.network.cut.update(ways)
        self._while(0.5, 9.0, lambda: self.network.cut.difference_update(ways))

    def _lossy(self, worker: VirtualWorker) -> None:
        self.network.lossy, self.network.slow_s = 0.01, 0.02
        self._while(0.5, 3.0, self._clear)

    def _clear(self) -> None:
        self.network.lossy, self.network.slow_s = 0.0, 0.001

    def _jump(self, worker: VirtualWorker) -> None:
        self.directory.skew_s += self.random.choice((-2.0, 1.0, 4.0))

    def _lose_directory(self, worker: VirtualWorker) -> None:
        self.directory.alive = False
        self._while(0.3, 3.0, self._new_directory)

    def _new_directory(self) -> None:
        self.directory.alive = False
        self.directory = VirtualDirectory(self, self._shares, next(self._incarnations))

    def _two_directories(self, worker: VirtualWorker) -> None:
        names = [one.name for one in (*self.workers, *self.clients)]
        old = self.directory
        self.directory = VirtualDirectory(self, self._shares, next(self._incarnations))
        self._old_directory = old, set(self.random.sample(names, self.random.randint(1, len(names))))
        self._while(0.5, 4.0, self._one_directory)

    def _one_directory(self) -> None:
        if self._old_directory is not None:
            self._old_directory[0].alive = False
            self._old_directory = None

    def _leave(self, worker: VirtualWorker) -> None:
        """It is stopped in good order: it hands over, then ends."""

        def ask() -> None:
            directory = self.directory
            if not worker.alive:
                return
            if not directory.alive or directory.membership.retire(worker.name):
                directory.membership.leave(worker.name)
                self.happened["hand-over"] += 1
                self.kill(worker)
            elif self.line.now_s < self.faults_end_s:
                self.line.after(0.25, ask)
            else:
                self.kill(worker)

        ask()

    def _resize(self, worker: VirtualWorker) -> None:
        wanted = self.slots + self.random.choice((-1, 1))
        if wanted < 1 or wanted > self.directory.membership.most_slots():
            return
        self.slots = wanted
        self.directory.membership.resize({"": wanted})
        if len(self.workers) > wanted:
            self._leave(worker)
        else:
            self._start_worker()

    def _reshare(self, worker: VirtualWorker) -> None:
        membership = self.directory.membership
        if not membership.settled():
            return
        shares = {name: share_LE.copy() for name, share_LE in membership.shares().items()}
        giver, taker = self.random.choice(list(shares)), self.random.choice(list(shares))
        may_LE = shares[giver] & ~shares[taker]
        if may_LE.any():
            layer, expert = self.random.choice(np.argwhere(may_LE).tolist())
            shares[giver][layer, expert], shares[taker][layer, expert] = False, True
            membership.reshare(shares, {name: share_LE + 0.01 for name, share_LE in shares.items()})
            self.happened["move"] += 1

    def _heal(self) -> None:
        self.network.cut.clear()
        self._clear()
        self._one_directory()
        if not self.directory.alive:
            self._new_directory()
        for worker in list(self.workers):
            worker.slowness, worker.failures = 1.0, 0
            if worker.stopped:
                worker.go_on()
