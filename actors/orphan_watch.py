"""Ends a worker to which nobody speaks any more: a detached actor outlives its Coordinator."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import ray

from pdray.control.suspicions import Suspicions

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
ORPHANED_AFTER_S = 60.0  # without heartbeat and router; longer than Ray needs to start a Coordinator again
MASTERS = "Coordinator and routers"


class OrphanWatch:
    """Event loop's thread only.

    Args:
        name: of the worker. has_routers: whether a session with a router is open.
    """

    def __init__(self, name: str, has_routers: Callable[[], bool]) -> None:
        self._name = name
        self._has_routers = has_routers
        self._masters = Suspicions(CHECK_INTERVAL_S)

    def heard(self) -> None:
        """The Coordinator has asked for a heartbeat."""
        self._masters.heard(time.monotonic(), MASTERS, "")

    async def run(self) -> None:
        """End this actor once it has heard nothing for ORPHANED_AFTER_S."""
        self._masters.expect(
            time.monotonic(),
            MASTERS,
            "",
            ORPHANED_AFTER_S,
            sign="no heartbeat and no session",
            next="this worker ends",
        )
        while True:
            if self._has_routers():
                self.heard()
            for suspicion in self._masters.due(time.monotonic()):
                logger.error("%s: %s", self._name, suspicion)
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
            await asyncio.sleep(CHECK_INTERVAL_S)
