"""Waits for clients: how many, how long, and who gives way; on a clock of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DeepsplitError, Draining, Overloaded, Plane, Reason, RequestTimeout
from deployments.gateway.arrivals import Arrivals
from tests.unit.deployments.gateway.clocked_loop import run


def arrivals(most: int, least_s: float = 1.0) -> Arrivals:
    return Arrivals("it", most, least_s, Reason.BODIES)


async def never() -> None:
    await asyncio.Event().wait()


async def soon() -> str:
    await asyncio.sleep(0.1)
    return "here"


def now_s() -> float:
    return asyncio.get_running_loop().time()


async def asked(*waits: Coroutine[object, object, object]) -> list[asyncio.Task[object]]:
    """Tasks that have all begun to wait."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.sleep(0)
    return tasks


def test_what_comes_and_what_does_not() -> None:
    async def scenario() -> None:
        waits = arrivals(1)
        assert await waits.next("a", soon, 5) == "here"
        with pytest.raises(RequestTimeout, match="it did not arrive within 5 s"):
            await waits.next("a", never, 5)
        assert (len(waits), now_s()) == (0, 5.1)

    run(scenario())


def test_what_the_message_itself_raises_passes() -> None:
    async def scenario() -> None:
        async def late() -> None:
            raise TimeoutError

        async def wrong() -> None:
            raise ZeroDivisionError

        waits = arrivals(1)
        with pytest.raises(ZeroDivisionError):
            await waits.next("a", wrong, 5)
        with pytest.raises(RequestTimeout):
            await waits.next("a", late, 5)
        assert await waits.next("a", soon, 5) == "here"

    run(scenario())


def test_the_oldest_gives_way_but_not_before_it_had_its_time() -> None:
    async def scenario() -> None:
        waits = arrivals(2)
        first, second = await asked(waits.next("a", never, 60), waits.next("b", never, 60))
        assert await waits.next("c", soon, 60) == "here"
        assert now_s() == 1.1
        with pytest.raises(Overloaded, match="it did not arrive, and others needed its place") as raised:
            await first
        assert (raised.value.plane, raised.value.reason) == (Plane.GATEWAY, Reason.BODIES)
        assert (second.done(), len(waits)) == (False, 1)
        second.cancel()

    run(scenario())


def test_whoever_has_the_most_gives_way_and_whoever_has_the_fewest_is_next() -> None:
    async def scenario() -> None:
        waits = arrivals(3)
        (honest,) = await asked(waits.next("honest", never, 60))
        flood = await asked(*(waits.next("flood", never, 60) for _ in range(100)))
        assert await waits.next("other", soon, 60) == "here"
        assert now_s() <= 2.2  # not behind the hundred
        assert not honest.done()
        await asyncio.wait(flood)
        assert sum(isinstance(one.exception(), Overloaded) for one in flood) >= 98
        assert now_s() < 112  # a second each for two at a time, and the last two a minute
        honest.cancel()

    run(scenario())


def test_a_burst_of_messages_that_come_loses_none() -> None:
    async def scenario() -> None:
        waits = arrivals(4)
        burst = await asked(*(waits.next(str(n % 3), soon, 60) for n in range(36)))
        assert await asyncio.gather(*burst) == ["here"] * 36
        assert now_s() == pytest.approx(0.9)

    run(scenario())


def test_all_are_ended_at_once() -> None:
    async def scenario() -> None:
        waits = arrivals(3)
        held = await asked(*(waits.next("a", never, 60) for _ in range(3)))
        waits.end_all(Draining("bye", retry_after_s=1, plane=Plane.GATEWAY, reason=Reason.DRAINING))
        assert [str(one) for one in await asyncio.gather(*held, return_exceptions=True)] == ["bye"] * 3
        assert (now_s(), waits.evict()) == (0, False)

    run(scenario())


@settings(deadline=None)
@given(
    most=st.integers(1, 3),
    calls=st.lists(
        st.tuples(
            st.floats(0, 5),  # when it comes
            st.sampled_from("ab"),
            st.one_of(st.none(), st.floats(0, 3)),  # how long its message takes
            st.one_of(st.none(), st.floats(0, 5)),  # when it is cancelled
        ),
        max_size=12,
    ),
)
def test_whatever_happens_every_place_comes_back(
    most: int, calls: list[tuple[float, str, float | None, float | None]]
) -> None:
    async def scenario() -> None:
        waits = arrivals(most, least_s=0.5)
        at_once = 0

        async def call(begin_s: float, whose: str, takes_s: float | None) -> None:
            async def message() -> None:
                nonlocal at_once
                at_once += 1
                assert at_once <= most
                try:
                    await (never() if takes_s is None else asyncio.sleep(takes_s))
                finally:
                    at_once -= 1

            await asyncio.sleep(begin_s)
            with contextlib.suppress(DeepsplitError):
                await waits.next(whose, message, 10)

        tasks = [asyncio.ensure_future(call(begin_s, whose, takes_s)) for begin_s, whose, takes_s, _ in calls]
        for task, (_, _, _, cancel_s) in zip(tasks, calls, strict=True):
            if cancel_s is not None:
                asyncio.get_running_loop().call_later(cancel_s, task.cancel)
        if tasks:
            await asyncio.wait(tasks)
        assert [one for one in tasks if not one.cancelled() and one.exception()] == []
        assert len(waits) == 0
        began_s = now_s()
        assert await asyncio.gather(*(waits.next("c", soon, 10) for _ in range(most))) == ["here"] * most
        assert now_s() - began_s == pytest.approx(0.1)  # all at the same time

    run(scenario())
