"""An answer's chunks on their way to the client, each wait bounded, the end told exactly once."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType

from deployments.directory.members import ResponseHead
from deployments.gateway.deadline import Deadline
from deployments.gateway.door import Answer

Ended = Callable[[BaseException | None, int], None]  # by which error (None: well), with the replica's status


class _Chunks(AsyncGenerator[bytes, None]):
    """What is left of an answer after its head, each wait bounded. A class, because a generator that was never begun
    runs no `finally`: a client that goes away right after the head must not leave its ticket behind.
    """

    def __init__(
        self, answer: AsyncGenerator[ResponseHead | bytes, None], deadline: Deadline, status: int, ended: Ended
    ) -> None:
        self._answer = answer
        self._deadline = deadline
        self._status = status
        self._ended = ended

    async def asend(self, value: None) -> bytes:
        try:
            chunk = await self._deadline.wait(anext(self._answer))
        except BaseException as error:
            await self._end(None if isinstance(error, StopAsyncIteration) else error)
            raise
        assert isinstance(chunk, bytes)
        return chunk

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
    ) -> bytes:
        await self.aclose()
        raise typ

    async def aclose(self) -> None:
        await self._end(GeneratorExit())

    async def _end(self, error: BaseException | None) -> None:
        try:
            await self._answer.aclose()
        finally:
            self._ended(error, self._status)


async def open_answer(
    answer: AsyncGenerator[ResponseHead | bytes, None], deadline: Deadline, headers: Mapping[str, str], ended: Ended
) -> Answer:
    """Waits for the head. Raises what the answer raises before it, and then `ended` is not called."""
    try:
        head = await deadline.wait(anext(answer))
        assert isinstance(head, ResponseHead)
    except BaseException:
        await answer.aclose()
        raise
    return Answer(head.status, head.content_type, headers, _Chunks(answer, deadline, head.status, ended))
