"""Background tasks that end are noticed."""

from __future__ import annotations

import asyncio
import logging

import pytest

from deployments.hosting.background import BackgroundTasks

logger = logging.getLogger(__name__)


async def _fail() -> None:
    raise ValueError("broken")


async def _return() -> None:
    return


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_task_that_fails_is_named_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        tasks = BackgroundTasks(logger)
        tasks.start("the tick", _fail())
        tasks.check()
        await _turns()
        with pytest.raises(RuntimeError, match="the tick failed: ValueError"):
            tasks.check()
        await tasks.cancel()

    asyncio.run(run())
    assert "the tick" in caplog.text


def test_the_first_one_that_ended_is_named_also_one_that_returned() -> None:
    async def run() -> None:
        tasks = BackgroundTasks(logger)
        tasks.start("one that returns", _return())
        await _turns()
        tasks.start("one that fails", _fail())
        await _turns()
        with pytest.raises(RuntimeError, match="one that returns returned"):
            tasks.check()
        await tasks.cancel()

    asyncio.run(run())


def test_those_that_are_cancelled_here_are_no_failure() -> None:
    async def run() -> None:
        tasks = BackgroundTasks(logger)
        ended = asyncio.Event()

        async def wait() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        tasks.start("a wait", wait())
        await _turns()
        tasks.check()
        await tasks.cancel()
        assert ended.is_set()
        tasks.check()

    asyncio.run(run())
