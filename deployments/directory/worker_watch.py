"""Notices at once that an expert worker's process has ended, seconds before its heartbeats are missed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping

import grpc

from cluster.config import DispatchConfig, InternalTlsConfig
from cluster.errors import StartupError
from cluster.tls.grpc_credentials import ExpertChannels
from routing.tokens.channel import channel_options

logger = logging.getLogger(__name__)

_RETRY_S = 1.0  # a tenth of it after a break: the kernel closes what a dead process had one by one


class WorkerWatch:
    """Keeps a connection to each worker's port. One that breaks, to a port that then refuses another, was the process's
    end; a worker that is stopped, cut off or slow is left to the heartbeats. To be used on one event loop.
    """

    def __init__(
        self, settings: DispatchConfig, tls: InternalTlsConfig | None, ended: Callable[[str], None]
    ) -> None:
        """`ended` is called with the id of a worker whose process is gone. Watches nobody where the files of `tls` are
        not: they need only be where attention and experts are.
        """
        self._settings = settings
        self._channels: ExpertChannels | None = None
        self._blind = False
        if tls is not None:
            try:
                self._channels = ExpertChannels(tls)
            except StartupError as error:
                logger.warning("the end of an expert worker is noticed by its missing heartbeats alone: %s", error)
                self._blind = True
        self._ended = ended
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}

    def watch(self, addresses: Mapping[str, str]) -> None:
        """Watch these workers (address, host:port, by id) and no others."""
        wanted = set() if self._blind else set(addresses.items())
        for key in self._tasks.keys() - wanted:
            self._tasks.pop(key).cancel()
        for key in wanted - self._tasks.keys():
            self._tasks[key] = asyncio.get_running_loop().create_task(self._watch(*key))

    async def _watch(self, worker_id: str, address: str) -> None:
        met = False  # its process has answered here
        while True:
            with contextlib.suppress(Exception):  # whatever it is: look again
                async with self._channel(address) as channel:
                    async with asyncio.timeout(_RETRY_S):
                        await channel.channel_ready()
                    met = True
                    await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            if met and await self._refused(address):
                self._ended(worker_id)
                return
            await asyncio.sleep(_RETRY_S / 10 if met else _RETRY_S)

    def _channel(self, address: str) -> grpc.aio.Channel:
        options: list[tuple[str, str | int]] = [*channel_options(self._settings)]
        if self._channels is None:
            return grpc.aio.insecure_channel(address, options)
        options += self._channels.options()
        return grpc.aio.secure_channel(address, self._channels.credentials(), options)

    async def _refused(self, address: str) -> bool:
        host, port = address.rsplit(":", 1)
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
        except ConnectionRefusedError:
            return True
        except (OSError, TimeoutError):
            return False
        writer.close()
        return False
