"""Waiting for a Coordinator: one whose process hangs is ended, and Ray starts it again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from ray.actor import ActorHandle
from ray.exceptions import RayError

from pdray.actors.process_death import make_dead
from pdray.actors.questions import ActorProcess, find_process
from pdray.cluster.suspicions import Suspicions
from pdray.errors import PdrayError

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
SILENT_LIMIT_S = 5.0  # twice in a row, for one process; it answers every two seconds
KILL_TIMEOUT_S = 10.0

T = TypeVar("T")


class Vigil:
    """What a caller of a Coordinator knows of its life. For calls that it answers soon, whatever it does.

    Whoever waits for it may find out that it hangs, several at once. All of them end the very process that they found
    silent, by its pid: that is the same whoever is first, and harmless to the process that Ray starts next. No call
    may be under way with several vigils of one caller.
    """

    def __init__(self, actor: ActorHandle) -> None:
        self._actor_id = actor._actor_id.hex()
        self._silent = Suspicions(CHECK_INTERVAL_S)

    async def wait(self, call: Awaitable[T]) -> T:
        """The call's answer, as soon as it comes.

        Raises:
            RayActorError: the Coordinator has ended, perhaps by this. What the call raises.
        """
        answer = asyncio.ensure_future(call)
        suspect: ActorProcess | None = None
        sign, then = "no answer", "its process is looked up, and ended at the second time"
        self._silent.expect(time.monotonic(), "coordinator", "", SILENT_LIMIT_S, sign=sign, next=then)
        try:
            while not answer.done():
                await asyncio.wait({answer}, timeout=CHECK_INTERVAL_S)
                for suspicion in [] if answer.done() else self._silent.due(time.monotonic()):
                    logger.warning("%s", suspicion)
                    suspect = await self._suspected(suspect)
            return answer.result()
        finally:
            answer.cancel()

    async def _suspected(self, before: ActorProcess | None) -> ActorProcess | None:
        """It is silent. Returns its process, which is ended if it is the one that was silent before."""
        try:
            process = await find_process(self._actor_id)
            if process.state != "ALIVE":  # Ray is starting it, or knows that it is gone
                return None
            if process == before:
                async with asyncio.timeout(KILL_TIMEOUT_S):
                    await make_dead(process.pid, process.node_id, grace_s=0.0)
                logger.error("the Coordinator's process %d did not answer and was ended", process.pid)
        except (RayError, PdrayError, TimeoutError) as error:  # said again after another limit
            logger.warning("the Coordinator does not answer, and could not be ended: %r", error)
            return before
        return process
