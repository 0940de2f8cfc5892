"""Waiting for a Coordinator: one whose process hangs is ended, and Ray starts it again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from typing import TypeVar

from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.client import ray as client

from pdray.actors.process_death import make_dead
from pdray.actors.questions import ActorProcess, find_process
from pdray.control.suspicions import Suspicions
from pdray.errors import PdrayError

logger = logging.getLogger(__name__)

CHECK_INTERVAL_S = 1.0
SILENT_LIMIT_S = 5.0  # twice in a row, for one process
KILL_TIMEOUT_S = 10.0

T = TypeVar("T")


async def keep_vigil(actor: ActorHandle, call: Awaitable[T]) -> T:
    """The answer of a call that a Coordinator answers within a few seconds, whatever it does, as soon as it comes.

    Whoever waits for it may find out that it hangs, several at once. All of them end the very process that they found
    silent, by its pid: that is the same whoever is first, and harmless to the process that Ray starts next.

    Raises:
        RayActorError: the Coordinator has ended, perhaps by this. What the call raises.
    """
    answer = asyncio.ensure_future(call)
    silent = Suspicions(CHECK_INTERVAL_S)
    suspect: ActorProcess | None = None
    sign, then = "no answer", "its process is looked up, and ended at the second time"
    silent.expect(time.monotonic(), "the Coordinator", "", SILENT_LIMIT_S, sign=sign, next=then)
    try:
        while not answer.done():
            await asyncio.wait({answer}, timeout=CHECK_INTERVAL_S)
            for suspicion in [] if answer.done() else silent.due(time.monotonic()):
                logger.warning("%s", suspicion)
                suspect = await _suspected(actor, suspect)
        return answer.result()
    finally:
        answer.cancel()


async def _suspected(actor: ActorHandle, before: ActorProcess | None) -> ActorProcess | None:
    """It is silent. Returns its process, which is ended if it is the one that was silent before."""
    if client.is_connected():
        return None  # a driver that is no part of the cluster cannot see or end its processes; routers in it can
    try:
        process = await find_process(actor._actor_id.hex())
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
