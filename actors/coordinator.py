"""The Coordinator: an application's workers, and who may know about them.

One actor per application and configuration. The table is `pdray.cluster.membership.Membership`, its hands
are `WorkerFleet`; this class answers routers and the command line, and ends the application when it
is no longer wanted. It is no part of any request's path.

Its event loop waits for nobody: every question to Ray or to Serve is a task of its own with a deadline.
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

from pdray.actors.fence import Fence, SupersededError
from pdray.actors.fleet import TICK_S, WorkerFleet
from pdray.actors.questions import ask
from pdray.actors.serve_status import SERVE_TIMEOUT_S, is_listed
from pdray.background import BackgroundTasks, LoopFailures
from pdray.cluster.membership import Membership
from pdray.cluster.messages import ClusterView, Heartbeat, WorkerInfo
from pdray.cluster.wanted import Wanted
from pdray.config import Config
from pdray.errors import PdrayError
from pdray.metrics import LoopMetrics

logger = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 2.0  # a watch that saw nothing new answers with the view it has: its sign of life
FORGET_ROUTER_S = 20.0
SERVE_CHECK_INTERVAL_S = 2.0
DESCRIBE_TIMEOUT_S = 10.0


class Coordinator:
    """Actor.

    Args:
        app_name: prefix of the workers' names; of a Serve application, its name.
        detached: True for a Serve application: actors outlive who created them, and end when the
            application has left Serve (see pdray.cluster.wanted).
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
        self._failures = LoopFailures(on_failure=LoopMetrics("coordinator").on_failure)
        self._fleet = WorkerFleet(
            config, app_name, self._membership, self.secret, self, self._failures, detached=detached
        )
        self._fence = Fence()
        self._wake = asyncio.Event()
        self._adopted = asyncio.Event()
        self._routers: dict[str, dict[str, Any]] = {}
        self._worker_failures: dict[str, dict[str, str]] = {}
        self._wanted = Wanted(time.monotonic(), TICK_S)
        self._tasks = BackgroundTasks(self._task_failed, self._failures)
        self._tasks.keep_running("supervise", self._supervise)
        if detached:
            self._tasks.keep_running("ask Serve", self._ask_serve)

    def __repr__(self) -> str:
        return f"Coordinator({self.app_name})"

    async def get_secret(self) -> bytes:
        """The cluster's secret: that of whoever was first to create this actor."""
        return self.secret

    async def watch(self, version: int, router: dict[str, Any] | None = None) -> ClusterView | None:
        """The view, as soon as it is newer than ``version``, or after WATCH_TIMEOUT_S as it is then.

        None if there is none by then: this Coordinator is alive, and still finds out what a former one has left.

        Args:
            router: what the router says of itself, for `pdray status`; its call is its sign of life.
        """
        deadline = time.monotonic() + WATCH_TIMEOUT_S
        self._wanted.router_seen(time.monotonic())
        if router is not None:
            self._routers[router["router_id"]] = {**router, "seen": time.monotonic()}
        while (left := deadline - time.monotonic()) > 0:
            if self._adopted.is_set() and self._membership.view.version > version:
                break
            await self._changed(left)
        return self._membership.view if self._adopted.is_set() else None

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
        for worker_id, trouble in self._membership.troubles().items():
            rows[worker_id]["trouble"] = trouble
        horizon = time.monotonic() - FORGET_ROUTER_S
        self._routers = {name: router for name, router in self._routers.items() if router["seen"] > horizon}
        return {
            "name": self.app_name,
            "pid": os.getpid(),
            "model": self.config.model_name,
            "mode": self.config.mode,
            "state": "serving" if self._membership.serving else "not ready",
            "error": view.error,
            "workers": list(rows.values()),
            "suspicions": [str(each) for each in self._fleet.suspicions.growing(time.monotonic())],
            "loop_failures": self._loop_failures(),
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
        async with asyncio.timeout(DESCRIBE_TIMEOUT_S):
            answers: list[list[str]] = await asyncio.gather(
                *(self._fleet.actor(info).check_integrity.remote() for info in workers)
            )
        return {info.worker_id: problems for info, problems in zip(workers, answers, strict=True)}

    async def stop(self) -> None:
        """End every worker and see its process gone; this actor is then killed by the caller. Idempotent."""
        self._tasks.cancel()
        await self._fleet.stop()

    # FleetOwner

    def on_change(self) -> None:
        """See FleetOwner."""
        self._wake.set()
        self._wake = asyncio.Event()

    def on_heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> None:
        """See FleetOwner. A worker's session with a router is that router's sign of life."""
        self._worker_failures[worker_id] = heartbeat.loop_failures
        if heartbeat.num_routers:
            self._wanted.router_seen(time.monotonic())

    async def check_current(self) -> None:
        """See FleetOwner. A process that Ray has started another for ends: it woke up too late."""
        try:
            await self._fence.check()
        except SupersededError as error:
            self._end_superseded(error)

    # background

    async def _supervise(self) -> None:
        """Does what is due, and ends a detached application that is no longer wanted."""
        if not self._adopted.is_set():
            try:
                await self._fence.established()
            except SupersededError as error:
                self._end_superseded(error)
            await self._fleet.adopt()
            self._adopted.set()
            self.on_change()
        while True:
            self._fleet.tick()
            if self.detached and (reason := self._wanted.reason_to_end(time.monotonic())) is not None:
                logger.warning("%s is no longer wanted (%s): stopping its workers", self.app_name, reason)
                await self.check_current()
                await self._fleet.stop()
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
            await asyncio.sleep(TICK_S)

    async def _ask_serve(self) -> None:
        """Whether Serve still has the application. No answer is no answer: only _wanted draws conclusions."""
        while True:
            await asyncio.sleep(SERVE_CHECK_INTERVAL_S)
            try:
                listed = await ask(
                    lambda: is_listed(self.app_name), what="Serve's applications", timeout_s=SERVE_TIMEOUT_S
                )
            except (RayError, PdrayError) as error:
                logger.warning("%s: Serve cannot be asked: %s", self.app_name, error)
            else:
                self._wanted.serve_answered(time.monotonic(), is_listed=listed)

    def _end_superseded(self, error: SupersededError) -> None:
        logger.error("%s: %s: ending", self.app_name, error)
        os._exit(1)

    def _loop_failures(self) -> dict[str, str]:
        """Of every process of the application, by process and loop."""
        found = {f"coordinator: {name}": text for name, text in self._failures.describe().items()}
        for worker_id, failures in self._worker_failures.items():
            found |= {f"{worker_id}: {name}": text for name, text in failures.items()}
        for router in self._routers.values():
            for name, text in router.get("loop_failures", {}).items():
                found[f"{router['router_id']}: {name}"] = text
        return found

    def _task_failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self.app_name, exc_info=error)

    async def _changed(self, timeout_s: float) -> None:
        """Returns after the next change, or the timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
