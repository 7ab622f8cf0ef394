from __future__ import annotations

import asyncio

import pytest

from cluster.errors import Draining, RequestTimeout
from deployments.gateway.deadline import Deadline

LATE = RequestTimeout("too late")


def test_a_result_in_time_and_one_too_late() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        deadline = Deadline(loop.time() + 60, LATE)
        assert await deadline.wait(asyncio.sleep(0, "done")) == "done"
        with pytest.raises(RequestTimeout, match="too late"):
            await Deadline(loop.time(), LATE).wait(asyncio.sleep(60))

    asyncio.run(run())


def test_cut_ends_the_wait_that_runs_and_those_to_come() -> None:
    async def run() -> None:
        deadline = Deadline(asyncio.get_running_loop().time() + 60, LATE)
        stopped = Draining("stopping", retry_after_s=1, plane="gateway", reason="draining")
        waiting = asyncio.create_task(deadline.wait(asyncio.sleep(60)))
        await asyncio.sleep(0)
        deadline.cut(stopped)
        with pytest.raises(Draining):
            await waiting
        with pytest.raises(Draining):
            await deadline.wait(asyncio.sleep(60))

    asyncio.run(run())


def test_a_cancelled_waiter_cancels_what_it_waits_for() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(60)
            finally:
                ended.set()

        waiting = asyncio.create_task(Deadline(asyncio.get_running_loop().time() + 60, LATE).wait(work()))
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert ended.is_set()

    asyncio.run(run())
