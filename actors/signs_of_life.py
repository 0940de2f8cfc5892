"""Whether workers live: their pending join(), which ends when they do, and their heartbeats."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import Protocol

from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from pdray.actors.questions import first_line
from pdray.actors.worker_process import WorkerProcess
from pdray.background import BackgroundTasks
from pdray.control.suspicions import Suspicions
from pdray.wire.cluster_view import Heartbeat

logger = logging.getLogger(__name__)

RETRY_S = 0.1


class SignsOwner(Protocol):
    """Called on the event loop's thread."""

    def is_there(self, process: WorkerProcess) -> bool:
        """Whether the process is still to be watched."""
        ...

    def heard(self, process: WorkerProcess, heartbeat: Heartbeat) -> None: ...
    def suspect(self, worker_id: str, incarnation: str) -> None:
        """It has ended. One that is silent is for Suspicions.due() to name."""


class SignsOfLife:
    """Watches the workers of one fleet.

    Args:
        timeout_s: a worker silent for so long is suspected. tasks: in which they are watched.
    """

    def __init__(
        self, app_name: str, timeout_s: float, suspicions: Suspicions, tasks: BackgroundTasks, owner: SignsOwner
    ) -> None:
        self._app_name = app_name
        self._timeout_s = timeout_s
        self._suspicions = suspicions
        self._tasks = tasks
        self._owner = owner

    def watch(self, process: WorkerProcess) -> None:
        """From now on until its owner says that it is not there."""
        self._suspicions.expect(
            time.monotonic(),
            process.worker_id,
            process.incarnation,
            self._timeout_s,
            sign="no heartbeat",
            next="it is killed and replaced",
        )
        self._tasks.keep_running("await a worker's end", partial(self._await_end, process), of=process.incarnation)
        self._tasks.keep_running("heartbeats of a worker", partial(self._heartbeat, process), of=process.incarnation)

    async def _await_end(self, process: WorkerProcess) -> None:
        """The pending join() ends when the process does: Ray's death notice, in 10-25 ms."""
        assert process.actor is not None
        while self._owner.is_there(process):
            try:
                await process.actor.join.remote()
            except ActorUnavailableError:  # a lost connection is no death; if it was one, the next call says so
                await asyncio.sleep(RETRY_S)
                continue
            except RayError as error:
                logger.warning("%s: %s ended: %s", self._app_name, process.worker_id, first_line(error))
            self._owner.suspect(process.worker_id, process.incarnation)
            return

    async def _heartbeat(self, process: WorkerProcess) -> None:
        """A process that is stopped or hung never breaks join(); the table of suspicions misses its heartbeats."""
        assert process.actor is not None
        while self._owner.is_there(process):
            try:
                heartbeat: Heartbeat = await process.actor.heartbeat.remote()
            except RayActorError:  # join() says what that means
                await asyncio.sleep(RETRY_S)
                continue
            self._suspicions.heard(time.monotonic(), process.worker_id, process.incarnation)
            self._owner.heard(process, heartbeat)
            await asyncio.sleep(self._timeout_s / 4)
