"""What a caller sees of the directory's errors: one kind, and never its own end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import pytest

from deployments.directory.calls import DirectoryAway, answer_of


async def _raises(error: BaseException) -> None:
    raise error


async def _slow() -> None:
    await asyncio.sleep(60)


@pytest.mark.parametrize("error", [ValueError("there"), TypeError("other version"), asyncio.CancelledError()])
def test_errors_of_the_directory_are_one_kind(error: BaseException) -> None:
    with pytest.raises(DirectoryAway):
        asyncio.run(answer_of(_raises(error), 5))


def test_a_late_answer_is_one_too() -> None:
    with pytest.raises(DirectoryAway, match="TimeoutError"):
        asyncio.run(answer_of(_slow(), 0.01))


def test_who_is_cancelled_ends() -> None:
    async def scenario() -> None:
        call: Awaitable[None] = _slow()
        task = asyncio.create_task(answer_of(call, 60))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
