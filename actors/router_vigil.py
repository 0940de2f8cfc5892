"""Ends router replicas that hang; Serve then replaces them.

`pdray.control.silent_routers` decides, and this class acts. Runs on the Coordinator's event loop; what it asks Ray and
Serve, it asks in tasks of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from pdray.actors.process_death import make_dead
from pdray.actors.questions import ActorProcess, ask, find_process, within
from pdray.actors.serve_status import SERVE_NAMESPACE, SERVE_TIMEOUT_S, replica_actor_name
from pdray.background import BackgroundTasks
from pdray.control.silent_routers import EndRouter, Look, RouterEffect, RouterProcess, SilentRouters
from pdray.errors import PdrayError

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 3.0  # so that a look is over before the next one is due
KILL_TIMEOUT_S = 10.0


class RouterVigil:
    """Args:
    interval_s: tick() is called so often.
    session_limit_s: a worker that is silent for longer says nothing about its sessions.
    check_current: raises if this process must not act any more.
    """

    def __init__(
        self,
        app_name: str,
        interval_s: float,
        session_limit_s: float,
        check_current: Callable[[], Awaitable[None]],
        tasks: BackgroundTasks,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app_name = app_name
        self._table = SilentRouters(interval_s, session_limit_s)
        self._check_current = check_current
        self._tasks = tasks
        self._now = now

    def watched(self, router_id: str, process: RouterProcess) -> None:
        """A router replica has asked for the view."""
        self._table.watched(self._now(), router_id, process)

    def sessions_seen(self, router_ids: Iterable[str]) -> None:
        """A worker has told that it holds sessions with them."""
        for router_id in router_ids:
            self._table.session_seen(self._now(), router_id)

    def left(self, router_id: str) -> None:
        """It has ended by itself."""
        self._table.left(router_id)

    def growing(self) -> list[str]:
        """Suspicions, for `pdray status`."""
        return [str(each) for each in self._table.suspicions.growing(self._now())]

    def tick(self) -> None:
        """Begin what is due now."""
        for effect in self._table.tick(self._now()):
            self._tasks.spawn(self._carry_out(effect))

    async def _carry_out(self, effect: RouterEffect) -> None:
        """Whatever becomes of an effect, the table hears of it."""
        try:
            await self._check_current()
            match effect:
                case Look():
                    await self._look(effect)
                case EndRouter():
                    await self._end(effect)
        except Exception as error:
            if not isinstance(error, RayError | TimeoutError | ValueError | PdrayError):
                logger.exception("%s: internal error in %s", self._app_name, type(effect).__name__)
            what = "ending it" if isinstance(effect, EndRouter) else "looking at it"
            logger.warning("%s: %s does not watch, and %s failed: %r", self._app_name, effect.router_id, what, error)
            if isinstance(effect, EndRouter):
                self._table.end_failed(effect)
            else:
                self._table.unknown(effect)

    async def _look(self, look: Look) -> None:
        """Ask Ray whether the process is there, Serve whether the replica is its own, and the router for its health.

        Raises:
            RayError, PdrayError, TimeoutError, ValueError: nothing was found out.
        """
        process = look.process
        if not await _is_there(process):
            self._table.gone(look)
            return
        listed = partial(replica_actor_name, self._app_name, process.replica_id)
        name = await ask(listed, what="Serve's replicas", timeout_s=SERVE_TIMEOUT_S)
        if name is None:
            self._table.unknown(look)
            return
        replica: Any = await ask(partial(ray.get_actor, name, namespace=SERVE_NAMESPACE), what="who has a name")
        try:
            await within(replica.check_health.remote(), ANSWER_TIMEOUT_S)
        except TimeoutError:
            logger.warning("%s: %s does not watch, and does not answer", self._app_name, look.router_id)
            if (end := self._table.silent(look)) is not None:
                self._tasks.spawn(self._carry_out(end))
        except RayTaskError:  # it says that it is not healthy: what follows is Serve's business
            self._table.answered(self._now(), look)
        else:
            self._table.answered(self._now(), look)

    async def _end(self, end: EndRouter) -> None:
        process = end.process
        if not await _is_there(process):
            self._table.gone(end)
        elif self._table.may_end(self._now(), end):
            async with asyncio.timeout(KILL_TIMEOUT_S):
                await make_dead(process.pid, process.node_id, grace_s=0.0)
            logger.error(
                "%s: %s (process %d) hung and was ended; Serve starts another",
                *(self._app_name, end.router_id, process.pid),
            )
            self._table.gone(end)


async def _is_there(process: RouterProcess) -> bool:
    """Whether Ray's table has that very process. Raises NoAnswerError."""
    return await find_process(process.actor_id) == ActorProcess("ALIVE", process.pid, process.node_id)
