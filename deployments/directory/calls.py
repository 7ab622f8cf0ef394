"""How other processes call the directory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from ray.serve.handle import DeploymentHandle

_T = TypeVar("_T")


class DirectoryAway(Exception):
    """A call to the directory failed, for whatever reason: it is being restarted, out of reach, or of another version.
    The caller goes on with what it knows, and asks again.
    """


def over_grpc(directory: DeploymentHandle) -> DeploymentHandle:
    """Return a handle whose calls go to the directory's process over Serve's own gRPC (Ray's token guards it too).

    Through actor calls, which are Serve's default, one caller that is stopped (SIGSTOP, a frozen host) while it waits
    for its answer holds up the answers to all others: a replica reports results to callers one after the other.
    """
    return directory.options(_by_reference=False)


async def answer_of(call: Awaitable[_T], timeout_s: float) -> _T:
    """Return the answer to a call. Raises DirectoryAway; errors of the directory come as what they are there, even
    CancelledError, which must not end the caller's task.
    """
    try:
        return await asyncio.wait_for(call, timeout_s)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise DirectoryAway("the call was cancelled there") from None
    except Exception as error:
        raise DirectoryAway(f"{type(error).__name__}: {error}") from error
