"""Who may make the gRPC server hold a message or a call: callers with a key, and a bounded number of all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import grpc

from cluster.errors import Overloaded, Plane, Reason
from deployments.gateway.door import Door
from deployments.gateway.grpc.call import REQUEST_ID, key_of, request_id_of

_RETRY_S = 1.0


class Entrance:
    """Asked before anything of a call is read."""

    def __init__(self, door: Door, paths: Mapping[str, str], most_side_calls: int) -> None:
        """`paths`: method -> path that it asks the door for. The others (health, reflection, metadata) need no key, so
        no more than `most_side_calls` of them may be open: watches that nobody counts could take every call there is.
        """
        self._door = door
        self._paths = paths
        self._most_side_calls = most_side_calls
        self._side_calls = 0

    @contextmanager
    def call(self, method: str) -> Iterator[None]:
        """To be held for the whole call. Raises Overloaded."""
        if method in self._paths:
            yield
            return
        if self._side_calls >= self._most_side_calls:
            raise Overloaded(
                f"{self._side_calls} health, reflection and metadata calls are open, this server's limit",
                retry_after_s=_RETRY_S, plane=Plane.GATEWAY, reason=Reason.SIDE_CALLS,
            )  # fmt: skip
        self._side_calls += 1
        try:
            yield
        finally:
            self._side_calls -= 1

    def message(self, method: str, context: grpc.aio.ServicerContext) -> AbstractContextManager[None]:
        """To be held while the call's first message is read. Raises DeepsplitError; see `Door.arriving`."""
        if method not in self._paths:
            return nullcontext()
        request_id = request_id_of(context)
        context.set_trailing_metadata(((REQUEST_ID, request_id),))  # should it end here
        return self._door.arriving(self._paths[method], key_of(context), request_id)
