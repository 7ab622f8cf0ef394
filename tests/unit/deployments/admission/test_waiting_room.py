"""The waiting room over a decider that does as it is told: every ticket ends once, whoever decides or goes away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cluster.errors import Overloaded
from deployments.admission.messages import Event, Progress, Restore, Submit
from deployments.admission.waiting_room import PROGRESS_INTERVAL_S, WaitingRoom
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
        self.generated: dict[str, int] = {}  # of restored ones
        self.patience_s: dict[str, float | None] = {}  # of submitted ones
        self.fails_at: type[Event] | None = None

    def tell(self, event: Event) -> None:
        if type(event) is self.fails_at:
            raise ZeroDivisionError
        match event:
            case Submit(ask):
                self.heard.append(("submit", ask.ticket))
                self.patience_s[ask.ticket] = ask.deadline_s
            case Restore(ask, replica_id, generated_tokens):
                self.heard.append(("restore " + replica_id, ask.ticket))
                self.generated[ask.ticket] = generated_tokens
            case Progress(ticket, generated_tokens):
                self.heard.append((f"progress {generated_tokens}", ticket))
            case _:
                self.heard.append((type(event).__name__.lower(), event.ticket))

    def set_loads(self, loads: Sequence[ReplicaLoad]) -> None:
        self.loads = loads


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def waiting_room() -> tuple[WaitingRoom, Script, Clock]:
    clock, script = Clock(), Script()
    made = WaitingRoom(clock)
    made.decide_by(script)
    return made, script, clock


async def admitted(room: WaitingRoom, decision: Decision) -> Grant:
    """What becomes of ticket "a" when it is decided upon while it waits."""
    waiting = asyncio.create_task(room.admit(ask("a")))
    await settle()
    room.decided(decision)
    return await waiting


async def moved(room: WaitingRoom, decision: Decision) -> Grant:
    """The same for its move to another replica."""
    moving = asyncio.create_task(room.move("a"))
    await settle()
    room.decided(decision)
    return await moving


def test_granted_progress_finished() -> None:
    async def run() -> None:
        room, script, clock = waiting_room()
        assert (await admitted(room, granted("a"))).replica_id == "r0"
        for tokens in (1, 2, 3):
            room.progress("a", tokens)
        clock.now_s += PROGRESS_INTERVAL_S
        room.progress("a", 4)
        room.finish("a", Usage(5, 4))
        room.finish("a", Usage(5, 4))  # once is enough
        heard = [what for what, _ in script.heard]
        assert heard == ["submit", "progress 1", "progress 4", "finish"]
        assert room.open_tickets() == 0

    asyncio.run(run())


def test_refused() -> None:
    async def run() -> None:
        room, script, _ = waiting_room()
        with pytest.raises(Overloaded):
            await admitted(room, Refused("a", BUSY))
        room.finish("a", Usage(5, 4))
        assert script.heard == [("submit", "a")]
        assert room.open_tickets() == 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("decision", "told"),
    [(None, "cancel"), (granted("a"), "cancel"), (Refused("a", BUSY), None)],
)
def test_a_client_that_leaves_around_the_decision(decision: Decision | None, told: str | None) -> None:
    async def run() -> None:
        room, script, _ = waiting_room()
        waiting = asyncio.create_task(room.admit(ask("a")))
        await settle()
        if decision is not None:
            room.decided(decision)  # in the same turn of the loop as the cancellation
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert [what for what, _ in script.heard] == ["submit"] + ([told] if told else [])
        assert room.open_tickets() == 0
        room.decided(granted("a"))  # one that has been overtaken
        room.decided(Refused("a", BUSY))

    asyncio.run(run())


def test_a_submission_that_cannot_be_made_leaves_no_ticket() -> None:
    async def run() -> None:
        room, script, _ = waiting_room()
        script.fails_at = Submit
        with pytest.raises(ZeroDivisionError):
            await room.admit(ask("a"))
        assert room.open_tickets() == 0

    asyncio.run(run())


def test_move_and_its_refusal() -> None:
    async def run() -> None:
        room, _, _ = waiting_room()
        await admitted(room, granted("a"))
        assert (await moved(room, granted("a", "r1"))).replica_id == "r1"
        with pytest.raises(Overloaded):
            await moved(room, Refused("a", BUSY))
        assert room.open_tickets() == 0

    asyncio.run(run())


def test_a_client_that_leaves_while_its_request_moves_is_charged_what_was_generated() -> None:
    async def run() -> None:
        room, script, _ = waiting_room()
        await admitted(room, granted("a"))
        room.progress("a", 1)
        room.progress("a", 3)  # too soon to be told
        moving = asyncio.create_task(room.move("a"))
        await settle()
        moving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await moving
        assert [what for what, _ in script.heard] == ["submit", "progress 1", "progress 3", "move", "cancel"]
        assert room.open_tickets() == 0
        room.finish("a", Usage(5, 3))  # harmless

    asyncio.run(run())


def test_the_first_progress_after_a_move_is_told_at_once() -> None:
    async def run() -> None:
        room, script, _ = waiting_room()
        await admitted(room, granted("a"))
        room.progress("a", 1)
        await moved(room, granted("a", "r1"))
        for tokens in (2, 3):
            room.progress("a", tokens)
        heard = [what for what, _ in script.heard]
        assert heard == ["submit", "progress 1", "progress 1", "move", "progress 2"]

    asyncio.run(run())


def test_a_replica_that_is_lost_before_its_first_token_makes_no_progress() -> None:
    async def run() -> None:
        room, script, _ = waiting_room()
        await admitted(room, granted("a"))
        for replica in ("r1", "r2"):
            await moved(room, granted("a", replica))
        room.progress("a", 1)
        assert [what for what, _ in script.heard] == ["submit", "move", "move", "progress 1"]

    asyncio.run(run())


def test_one_that_was_granted_in_the_turn_of_a_change_over_runs_where_it_was_granted() -> None:
    async def run() -> None:
        room, _, _ = waiting_room()
        waiting = asyncio.create_task(room.admit(ask("a")))
        await settle()
        room.decided(granted("a"))
        room.decide_by(second := Script())  # before the task has seen its grant
        assert (await waiting).replica_id == "r0"
        assert second.heard == [("restore r0", "a")]

    asyncio.run(run())


def test_what_waits_holds_nothing_at_a_decider_that_is_left() -> None:
    async def run() -> None:
        room, script, _ = waiting_room()
        tasks = {name: asyncio.create_task(room.admit(ask(name))) for name in ("runs", "waits")}
        await settle()
        room.decided(granted("runs"))
        await settle()
        room.progress("runs", 4)
        room.decide_by(second := Script())
        assert script.heard[-1] == ("cancel", "waits")
        assert ("cancel", "runs") not in script.heard
        assert second.heard == [("restore r0", "runs"), ("submit", "waits")]
        assert second.generated == {"runs": 4}
        tasks["waits"].cancel()

    asyncio.run(run())


def test_another_decider_takes_over_everything() -> None:
    async def run() -> None:
        room, _, _ = waiting_room()
        room.set_loads([LOAD])
        tasks = {name: asyncio.create_task(room.admit(ask(name))) for name in ("runs", "waits", "moves")}
        await settle()
        for name in ("runs", "moves"):
            room.decided(granted(name))
        await settle()
        moving = asyncio.create_task(room.move("moves"))
        await settle()
        second = Script()
        room.decide_by(second)
        assert second.loads == [LOAD]
        assert sorted(second.heard[:2]) == [("restore r0", "moves"), ("restore r0", "runs")]
        assert sorted(second.heard[2:]) == [("move", "moves"), ("submit", "waits")]
        room.decided(granted("waits"))
        room.decided(granted("moves", "r1"))
        assert (await tasks["waits"]).replica_id == "r0"
        assert (await moving).replica_id == "r1"
        for name in tasks:
            room.finish(name, Usage(5, 0))
        assert [what for what, _ in second.heard[4:]] == ["finish"] * 3

    asyncio.run(run())


def test_a_clients_patience_does_not_begin_anew_with_another_decider() -> None:
    async def scenario() -> None:
        room, script, clock = waiting_room()
        asking = asyncio.create_task(room.admit(replace(ask("a"), deadline_s=1.0)))
        await settle()
        assert script.patience_s == {"a": 1.0}
        for waited_s, left_s in ((0.6, 0.4), (0.7, 0.0)):
            clock.now_s += waited_s
            script = Script()
            room.decide_by(script)
            assert script.patience_s == {"a": pytest.approx(left_s)}
        asking.cancel()
        await settle()

    asyncio.run(scenario())
