"""Keeps an attention replica's placement file at the directory's latest table."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.directory import LONG_POLL_S, AttentionMember
from routing.placement import PlacementFile, PlacementTable

RETRY_S = 1.0
_ANSWER_TIMEOUT_S = LONG_POLL_S + 10.0

logger = logging.getLogger("ray.serve")


class PlacementFollower:
    """Long-polls the directory, for the engine's processes, which are not in Ray.

    A thread and not a task: vLLM blocks the replica's event loop until its engine is up, and the engine waits for the
    first table. A directory that is away leaves the last table in force.
    """

    def __init__(
        self, directory: DeploymentHandle, file: PlacementFile, replica_id: str, state: Callable[[], str]
    ) -> None:
        """`state` says what the replica is doing; the directory passes it on to `deepsplit status`."""
        self._directory = directory
        self._file = file
        self._replica_id = replica_id
        self._state = state
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="placement-follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End within one long poll; does not wait for it."""
        self._stop.set()

    def _follow(self) -> None:
        node, epoch = ray.util.get_node_ip_address(), -1
        while not self._stop.is_set():
            member = AttentionMember(self._replica_id, os.getpid(), node, self._state())
            try:
                text: str | None = self._directory.table.remote(epoch, member).result(timeout_s=_ANSWER_TIMEOUT_S)
                if text is not None and not self._stop.is_set():
                    table = PlacementTable.from_json(text)
                    self._file.write(table)
                    epoch = table.epoch
            except (RayError, RayServeException, TimeoutError, OSError) as error:
                logger.warning("placement epoch %d stays: %s: %s", epoch, type(error).__name__, error)
                self._stop.wait(RETRY_S)
