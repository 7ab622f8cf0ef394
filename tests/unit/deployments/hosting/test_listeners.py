"""What servers listen on: nothing that is written waits for an acknowledgement."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from deployments.hosting.listeners import listen


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_no_small_write_waits_for_an_acknowledgement(loop: type[asyncio.AbstractEventLoop]) -> None:
    async def scenario() -> None:
        (listener,) = listen("127.0.0.1", 0, "gateway.port", share_port=True)
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def client(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("socket")
            accepted.set_result(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        server = await asyncio.start_server(client, sock=listener)
        async with server:
            _, writer = await asyncio.open_connection(*listener.getsockname())
            assert await accepted
            writer.close()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())
