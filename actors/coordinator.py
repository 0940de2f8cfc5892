"""The Coordinator: an application's workers, and who may know about them.

One actor per application and configuration. The table is `pdray.cluster.membership.Membership`, its hands
are `WorkerFleet`; this class answers routers and the command line, and ends the application when it
is no longer wanted. It is no part of any request's path.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any

import ray
from ray.exceptions import RayError

from pdray.actors.fleet import WorkerFleet
from pdray.background import BackgroundTasks
from pdray.cluster.membership import Membership
from pdray.cluster.messages import ClusterView, WorkerInfo
from pdray.config import Config

logger = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 10.0  # a watch that saw nothing new answers with the view it has
TICK_S = 0.5
SERVE_CHECK_INTERVAL_S = 2.0
UNWATCHED_LIMIT_S = 30.0


class Coordinator:
    """Actor.

    Args:
        app_name: prefix of the workers' names; of a Serve application, its name.
        detached: True for a Serve application: actors outlive who created them, and end when the
            application has left Serve, or when no router has watched for UNWATCHED_LIMIT_S.
        secret: of the cluster. Ray starts a Coordinator that died again, with the same arguments; it then goes on with
            the workers that are there.
    """

    def __init__(self, config: Config, app_name: str, secret: bytes, *, detached: bool) -> None:
        self.config = config
        self.app_name = app_name
        self.detached = detached
        self.secret = secret
        num_prefill = 0 if config.mode == "colocated" else config.num_prefill_workers
        self._membership = Membership(
            num_prefill, config.num_decode_workers, config.restart_backoff_s, generation=int(time.time())
        )
        self._fleet = WorkerFleet(
            config,
            app_name,
            self._membership,
            self.secret,
            detached=detached,
            on_change=self._wake_watchers,
        )
        self._wake = asyncio.Event()
        self._adopted = asyncio.Event()
        self._routers: dict[str, dict[str, Any]] = {}
        self._last_watch = time.monotonic()
        self._tasks = BackgroundTasks(self._supervisor_failed)
        self._tasks.spawn(self._supervise())

    def __repr__(self) -> str:
        return f"Coordinator({self.app_name})"

    async def get_secret(self) -> bytes:
        """The cluster's secret: that of whoever was first to create this actor."""
        return self.secret

    async def watch(self, version: int, router: dict[str, Any] | None = None) -> ClusterView:
        """The view, as soon as it is newer than ``version``, or after WATCH_TIMEOUT_S as it is then.

        Args:
            router: what the router says of itself, for `pdray status`; its call is its sign of life.
        """
        await self._adopted.wait()
        deadline = time.monotonic() + WATCH_TIMEOUT_S
        if router is not None:
            self._routers[router["router_id"]] = {**router, "seen": time.monotonic()}
        while self._membership.view.version <= version and (left := deadline - time.monotonic()) > 0:
            self._last_watch = time.monotonic()
            await self._changed(left)
        self._last_watch = time.monotonic()
        return self._membership.view

    async def wait_ready(self) -> str | None:
        """None once every worker is ready and every pair connected; else what kept one from it."""
        while (view := self._membership.view).error is None and not self._membership.serving:
            await self._changed(WATCH_TIMEOUT_S)
        return view.error

    async def describe(self) -> dict[str, Any]:
        """The application's state, for `pdray status`."""
        view = self._membership.view
        rows = {
            worker_id: {"worker_id": worker_id, "role": worker_id.rpartition("-")[0], "state": state}
            for worker_id, state in self._membership.states().items()
        }
        for answer in await asyncio.gather(*(self._describe(info) for info in view.workers)):
            rows[answer["worker_id"]] |= answer
        horizon = time.monotonic() - 2 * WATCH_TIMEOUT_S
        self._routers = {name: router for name, router in self._routers.items() if router["seen"] > horizon}
        return {
            "name": self.app_name,
            "pid": os.getpid(),
            "model": self.config.model_name,
            "mode": self.config.mode,
            "state": "serving" if self._membership.serving else "not ready",
            "error": view.error,
            "workers": list(rows.values()),
            "routers": [{k: v for k, v in router.items() if k != "seen"} for router in self._routers.values()],
            "pairs": [(pair.prefill_worker_id, pair.decode_worker_id, pair.epoch) for pair in view.pairs],
        }

    async def _describe(self, info: WorkerInfo) -> dict[str, Any]:
        """What a worker says of itself, or that it says nothing."""
        try:
            async with asyncio.timeout(self.config.worker_timeout_s):
                answer: dict[str, Any] = await self._fleet.actor(info).describe.remote()
        except (RayError, TimeoutError, KeyError) as error:
            return {"worker_id": info.worker_id, "state": f"no answer ({type(error).__name__})"}
        return answer

    async def check_integrity(self) -> dict[str, list[str]]:
        """Per worker, what is wrong with its block accounting; empty lists if nothing is."""
        workers = self._membership.view.workers
        answers: list[list[str]] = await asyncio.gather(
            *(self._fleet.actor(info).check_integrity.remote() for info in workers)
        )
        return {info.worker_id: problems for info, problems in zip(workers, answers, strict=True)}

    async def stop(self) -> None:
        """End every worker and see its process gone; this actor is then killed by the caller. Idempotent."""
        self._tasks.cancel()
        await self._fleet.stop()

    async def _supervise(self) -> None:
        """Does what is due, and ends a detached application that is no longer wanted."""
        await self._fleet.adopt()
        self._adopted.set()
        next_check = time.monotonic() + SERVE_CHECK_INTERVAL_S
        while True:
            self._fleet.tick()
            if self.detached and time.monotonic() >= next_check:
                if await self._is_unwanted():
                    logger.warning("%s is no longer wanted: stopping its workers", self.app_name)
                    await self._fleet.stop()
                    ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
                next_check = time.monotonic() + SERVE_CHECK_INTERVAL_S
            await asyncio.sleep(TICK_S)

    async def _is_unwanted(self) -> bool:
        if time.monotonic() - self._last_watch > UNWATCHED_LIMIT_S:
            return True
        return self.app_name not in await asyncio.to_thread(_serve_applications)

    def _supervisor_failed(self, error: BaseException) -> None:
        logger.error("%s: internal error; workers are no longer supervised", self.app_name, exc_info=error)
        self._membership.note_error(f"internal error: {error}")
        self._adopted.set()
        self._wake_watchers()

    def _wake_watchers(self) -> None:
        self._wake.set()
        self._wake = asyncio.Event()

    async def _changed(self, timeout_s: float) -> None:
        """Returns after the next change, or the timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()


def _serve_applications() -> set[str]:
    """Names of Serve's applications; none if Serve is gone. Importing it takes a second or two: not for the event
    loop's thread, where heartbeats are waited for.
    """
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return set(serve.status().applications)
    except (RayError, RayServeException):
        return set()
