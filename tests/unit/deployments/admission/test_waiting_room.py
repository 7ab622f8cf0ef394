"""The gate over a decider that does as it is told: every ticket ends once, whoever decides and whoever goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cluster.errors import Overloaded
from deployments.admission.waiting_room import PROGRESS_INTERVAL_S, Gate
from routing.requests.admission import Admitted, Decision, Refused
from routing.requests.request import Ask, Grant, Priority, ReplicaLoad, Tenant, Usage

TENANT = Tenant("t")
BUSY = Overloaded("busy", retry_after_s=1, plane="attention", reason="ttft")
LOAD = ReplicaLoad("r0", max_num_seqs=4, kv_cache_tokens=100)


def ask(ticket: str) -> Ask:
    return Ask(ticket, TENANT, Priority.INTERACTIVE, 5, 5, 1, (), None)


def granted(ticket: str, replica: str = "r0") -> Decision:
    return Admitted(Grant(ticket, replica, 0.1))


class Script:
    """Notes what it hears; decides only when the test says so."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.loads: Sequence[ReplicaLoad] = ()

    def offer(self, ask: Ask) -> None:
        self.heard.append(("offer", ask.ticket))

    def adopt(self, ask: Ask, replica_id: str) -> None:
        self.heard.append(("adopt " + replica_id, ask.ticket))

    def withdraw(self, ticket: str) -> None:
        self.heard.append(("withdraw", ticket))

    def first_token(self, ticket: str) -> None:
        self.heard.append(("first", ticket))

    def progress(self, ticket: str, generated_tokens: int) -> None:
        self.heard.append((f"progress {generated_tokens}", ticket))

    def move(self, ticket: str) -> None:
        self.heard.append(("move", ticket))

    def finish(self, ticket: str, usage: Usage | None) -> None:
        self.heard.append(("finish", ticket))

    def fleet(self, loads: Sequence[ReplicaLoad]) -> None:
        self.loads = loads


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def gate() -> tuple[Gate, Script, Clock]:
    clock, script = Clock(), Script()
    made = Gate(clock)
    made.decide_by(script)
    return made, script, clock


def test_granted_progress_finished() -> None:
    async def run() -> None:
        door, script, clock = gate()
        waiting = asyncio.create_task(door.admit(ask("a")))
        await settle()
        door.decided(granted("a"))
        assert (await waiting).replica_id == "r0"
        door.first_token("a")
        for tokens in (1, 2, 3):
            door.progress("a", tokens)
        clock.now_s += PROGRESS_INTERVAL_S
        door.progress("a", 4)
        door.finish("a", Usage(5, 4))
        door.finish("a", None)  # once is enough
        heard = [what for what, _ in script.heard]
        assert heard == ["offer", "first", "progress 1", "progress 4", "finish"]
        assert door.open_tickets() == 0

    asyncio.run(run())


def test_refused() -> None:
    async def run() -> None:
        door, script, _ = gate()
        waiting = asyncio.create_task(door.admit(ask("a")))
        await settle()
        door.decided(Refused("a", BUSY))
        with pytest.raises(Overloaded):
            await waiting
        door.finish("a", None)
        assert script.heard == [("offer", "a")]
        assert door.open_tickets() == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("decision", "told"),
    [(None, "withdraw"), (granted("a"), "finish"), (Refused("a", BUSY), None)],
)
def test_a_client_that_leaves_around_the_decision(decision: Decision | None, told: str | None) -> None:
    async def run() -> None:
        door, script, _ = gate()
        waiting = asyncio.create_task(door.admit(ask("a")))
        await settle()
        if decision is not None:
            door.decided(decision)  # in the same turn of the loop as the cancellation
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [what for what, _ in script.heard] == ["offer"] + ([told] if told else [])
        assert door.open_tickets() == 0
        door.decided(granted("a"))  # one that has been overtaken
        door.decided(Refused("a", BUSY))

    asyncio.run(run())


def test_an_offer_that_cannot_be_made_leaves_no_ticket() -> None:
    async def run() -> None:
        door, script, _ = gate()
        script.offer = lambda ask: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        with pytest.raises(ZeroDivisionError):
            await door.admit(ask("a"))
        assert door.open_tickets() == 0

    asyncio.run(run())


def test_move_and_its_refusal() -> None:
    async def run() -> None:
        door, _, _ = gate()
        first = asyncio.create_task(door.admit(ask("a")))
        await settle()
        door.decided(granted("a"))
        await first
        moving = asyncio.create_task(door.move("a"))
        await settle()
        door.decided(granted("a", "r1"))
        assert (await moving).replica_id == "r1"
        moving = asyncio.create_task(door.move("a"))
        await settle()
        door.decided(Refused("a", BUSY))
        with pytest.raises(Overloaded):
            await moving
        assert door.open_tickets() == 0

    asyncio.run(run())


def test_another_decider_takes_over_everything() -> None:
    async def run() -> None:
        door, _, _ = gate()
        door.fleet([LOAD])
        tasks = {name: asyncio.create_task(door.admit(ask(name))) for name in ("runs", "waits", "moves")}
        await settle()
        for name in ("runs", "moves"):
            door.decided(granted(name))
        await settle()
        moving = asyncio.create_task(door.move("moves"))
        await settle()
        second = Script()
        door.decide_by(second)
        assert second.loads == [LOAD]
        assert sorted(second.heard[:2]) == [("adopt r0", "moves"), ("adopt r0", "runs")]
        assert sorted(second.heard[2:]) == [("move", "moves"), ("offer", "waits")]
        door.decided(granted("waits"))
        door.decided(granted("moves", "r1"))
        assert (await tasks["waits"]).replica_id == "r0"
        assert (await moving).replica_id == "r1"
        for name in tasks:
            door.finish(name, None)
        assert [what for what, _ in second.heard[4:]] == ["finish"] * 3

    asyncio.run(run())
