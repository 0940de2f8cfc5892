"""The replica that stands for the workers, so that Serve's status says whether they can serve, and why not.

It takes no requests and holds no model: ending it, as Serve does with a replica that is not healthy, costs nothing.
Serve shows the text of what a constructor raises, and counts: after three the deployment has failed. So it raises
at once what stays as it is, and what may pass only twice, so that it can be read; then it waits to the end.
"""

from __future__ import annotations

import asyncio
import logging
import time

from ray import serve

from pdray.actors.client import CoordinatorClient, failure
from pdray.config import Config
from pdray.control.startup import NO_ROUTER
from pdray.errors import StartTimeoutError, WorkerDiedError

TELL_AFTER_S = 8.0  # that workers wait for something; or that routers do not come, once the workers are ready
TELL_TIMES = 2  # Serve gives a deployment of one replica three attempts
UNABLE_S = 10.0  # without a worker that can serve; a restart of some takes no longer
RETRY_S = 0.5
LOG_INTERVAL_S = 30.0

logger = logging.getLogger(__name__)


class WorkersReplica:
    """See the module."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]
        """Returns once the workers can serve.

        Raises:
            PdrayError: they never will, or cannot yet.
        """
        self._config = config
        app_name = serve.get_replica_context().app_name
        self._coordinator = await CoordinatorClient.open(config, app_name, detached=True)
        self._able_at = time.monotonic()
        await self._wait_ready()

    async def _wait_ready(self) -> None:
        began, logged_at, reason = time.monotonic(), 0.0, ""
        since, lacks_router = began, False
        while True:
            try:
                state = await self._coordinator.start_state(with_router=True)
            except WorkerDiedError:
                if self._coordinator.gone:
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            now = time.monotonic()
            if state.ready:
                return
            if state.failed:
                raise failure(state)
            if lacks_router != (state.reason == NO_ROUTER):  # loading takes its time, and routers come after it
                since, lacks_router = now, not lacks_router
            reason = state.reason or reason
            if reason and now - logged_at > LOG_INTERVAL_S:
                logger.warning("not ready: %s", reason)
                logged_at = now
            if reason and now - since > TELL_AFTER_S and await self._coordinator.tell(TELL_TIMES):
                raise StartTimeoutError(reason)
            if now - began > self._config.start_timeout_s:
                raise StartTimeoutError(
                    f"the workers were not ready within {self._config.start_timeout_s:g} s (start_timeout_s): {reason}"
                )

    async def check_health(self) -> None:
        """Raises while no worker can serve, and has not for a while."""
        try:
            view = await self._coordinator.watch(-1)
        except WorkerDiedError:
            if self._coordinator.gone:
                raise
            return  # Ray starts it again
        if view.can_serve or view.draining is not None:
            self._able_at = time.monotonic()
        elif time.monotonic() - self._able_at > UNABLE_S:
            raise RuntimeError(f"no worker can serve: {view.error or 'none is ready'}")
