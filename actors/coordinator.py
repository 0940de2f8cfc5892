"""The Coordinator: an application's workers, and who may know about them.

One actor per application and configuration. The table is `pdray.control.membership.Membership`, its hands
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
from functools import partial
from typing import Any

import msgspec
import ray

from pdray.actors.description import WatchingRouters, check_workers, describe_worker, loop_failures
from pdray.actors.fence import Fence, SupersededError
from pdray.actors.fleet import TICK_S, WorkerFleet
from pdray.actors.router_vigil import RouterVigil
from pdray.actors.serve_status import keep_asking
from pdray.actors.succession import Standing, Succession
from pdray.background import BackgroundTasks, LoopFailures
from pdray.config import Config
from pdray.control.generations import Phase
from pdray.control.guests import plan_guests
from pdray.control.membership import Membership
from pdray.control.pair_health import BrokenPair, PairHealth
from pdray.control.room import Held
from pdray.control.startup import NO_ROUTER, StartState, Startup
from pdray.control.wanted import Wanted
from pdray.metrics import LoopMetrics
from pdray.wire.cluster_view import ClusterView, Draining, Heartbeat

logger = logging.getLogger(__name__)

WATCH_TIMEOUT_S = 2.0  # a watch that saw nothing new answers with the view it has: its sign of life
START_POLL_S = 1.0
HANDING_OVER = "a newer configuration of this application takes its place; try again shortly"


class Coordinator:
    """Actor.

    Args:
        app_name: prefix of the workers' names; of a Serve application, its name.
        detached: True for a Serve application: actors outlive who created them, and end when the
            application has left Serve (see pdray.control.wanted).
        secret: of the cluster. Ray starts a Coordinator that died again, with the same arguments; it then goes on with
            the workers that are there.
    """

    def __init__(self, config: Config, app_name: str, secret: bytes, *, detached: bool) -> None:
        self.config = config
        self.app_name = app_name
        self.detached = detached
        self.secret = secret
        self._wake = asyncio.Event()
        self._startup = Startup()
        self._table_generation = 0
        self._num_told = 0
        self._pair_health = PairHealth()
        self._failures = LoopFailures(on_failure=LoopMetrics("coordinator", app_name).on_failure)
        self._fence = Fence()
        self._make_fleet()
        self._succession = Succession(config, app_name, self)
        self._adopted = asyncio.Event()
        self._routers = WatchingRouters(2 * WATCH_TIMEOUT_S)
        self._worker_failures: dict[str, dict[str, str]] = {}
        self._wanted = Wanted(time.monotonic(), TICK_S)
        self._tasks = BackgroundTasks(self._task_failed, self._failures)
        self._router_vigil = RouterVigil(app_name, TICK_S, config.worker_timeout_s, self.check_current, self._tasks)
        self._tasks.keep_running("supervise", self._supervise)
        if detached:
            self._tasks.keep_running("hand over", self._hand_over)
            self._tasks.keep_running("ask Serve", partial(keep_asking, app_name, self._wanted))

    def _make_fleet(self) -> None:
        """An empty table, newer than the one before, and hands for it."""
        config = self.config
        num_prefill = 0 if config.mode == "colocated" else config.num_prefill_workers
        self._table_generation = max(int(time.time()), self._table_generation + 1)
        table = num_prefill, config.num_decode_workers, config.restart_backoff_s, self._table_generation
        self._membership = Membership(*table, plan_guests(config))
        self._fleet = WorkerFleet(
            config,
            self.app_name,
            self._membership,
            self._startup,
            self.secret,
            self,
            self._failures,
            detached=self.detached,
        )

    def __repr__(self) -> str:
        return f"Coordinator({self.app_name})"

    async def open(self, opened_at: float) -> bytes | None:
        """A new router joins. Returns the cluster's secret, that of whoever was first to create this actor.

        None if this Coordinator is ending, and another must be created.

        Args:
            opened_at: wall-clock time; the configuration that was opened last is the one that Serve wants.
        """
        return self.secret if self._succession.generation.opened(opened_at, time.monotonic()) else None

    async def tell(self, at_most: int) -> bool:
        """Whether the reason why workers do not start yet should be told by an error, which it may be so many times."""
        self._num_told += 1
        return self._num_told <= at_most

    async def num_routers(self) -> int:
        """Routers that have been seen lately."""
        return self._succession.generation.num_routers(time.monotonic())

    async def report_broken(self, pair: BrokenPair) -> None:
        """A router's workers are connected, and do not serve a request."""
        logger.error("%s: %s and %s do not serve: %s", self.app_name, *pair[:2], pair.reason)
        step = self._pair_health.reported(time.monotonic(), pair, self._membership.view)
        if step is not None:
            self._fleet.mend(step, f"{pair.prefill_worker_id} and {pair.decode_worker_id} do not serve: {pair.reason}")

    async def leave(self, router_id: str) -> None:
        """A router has ended, and will not watch again."""
        self._routers.left(router_id)
        self._router_vigil.left(router_id)
        self._succession.generation.router_left(router_id)

    async def standing(self, name: str, opened_at: float, needs_room: bool) -> Standing:
        """For the Coordinator of another configuration of this application: see Succession.standing."""
        return await self._succession.standing(name, opened_at, needs_room)

    async def watch(self, version: int, router: dict[str, Any] | None = None) -> ClusterView | None:
        """The view, as soon as it is newer than ``version``, or after WATCH_TIMEOUT_S as it is then.

        None if there is none by then: this Coordinator is alive, and still finds out what a former one has left.

        Args:
            router: what the router says of itself, for `pdray status`; its call is its sign of life. A replica of Serve
                tells its "process", a RouterProcess.
        """
        deadline = time.monotonic() + WATCH_TIMEOUT_S
        self._wanted.router_seen(time.monotonic())
        if router is not None:
            opened_at = router.get("opened_at", 0.0)
            facts = {key: value for key, value in router.items() if key not in ("opened_at", "process")}
            if (process := router.get("process")) is not None:
                self._router_vigil.watched(router["router_id"], process)
                facts["pid"] = process.pid
            self._routers.seen(time.monotonic(), facts)
            self._succession.generation.router_seen(time.monotonic(), router["router_id"], opened_at)
            if not router.get("ready"):
                deadline = time.monotonic() + START_POLL_S  # so that it says soon when it is
            self.on_change()  # wait_ready()
        while (left := deadline - time.monotonic()) > 0:
            if self._adopted.is_set() and self._membership.view.version > version:
                break
            await self._changed(left)
        return self._view() if self._adopted.is_set() else None

    def _view(self) -> ClusterView:
        view, generation = self._membership.view, self._succession.generation
        if generation.phase is Phase.SERVING:
            return msgspec.structs.replace(view, error=self._start_state().reason or view.error)
        left_s = generation.drain_left_s(time.monotonic())
        return msgspec.structs.replace(view, draining=Draining(HANDING_OVER, left_s))

    def _start_state(self) -> StartState:
        return self._startup.state(ready=self._membership.serving)

    async def wait_ready(
        self, router_id: str = "", timeout_s: float = START_POLL_S, *, with_router: bool = False
    ) -> StartState:
        """As soon as every worker is ready and every pair connected, or none ever will be; else after a while.

        Args:
            router_id: of a router that waits to watch; its call is its sign of life.
            with_router: a router must be able to serve too.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self._wanted.router_seen(time.monotonic())
            if router_id:
                self._succession.generation.router_seen(time.monotonic(), router_id, 0.0)
            state = self._start_state()
            if with_router and state.ready and not self._routers.has_ready(time.monotonic()):
                state = StartState(False, reason=NO_ROUTER)
            if state.ready or state.failed or (left := deadline - time.monotonic()) <= 0:
                return state
            await self._changed(left)

    async def describe(self) -> dict[str, Any]:
        """The application's state, for `pdray status`."""
        view = self._membership.view
        rows = {
            worker_id: {"worker_id": worker_id, "role": worker_id.rpartition("-")[0], "state": state}
            for worker_id, state in self._membership.states().items()
        }
        for answer in await self._describe_workers():
            rows[answer["worker_id"]] |= answer
        for worker_id, trouble in self._membership.troubles().items():
            rows[worker_id]["trouble"] = trouble
        routers = self._routers.current(time.monotonic())
        return {
            "name": self.app_name,
            "pid": os.getpid(),
            "model": self.config.model_name,
            "mode": self.config.mode,
            "state": "serving" if self._membership.serving else "not ready",
            "phase": str(self._succession.generation.phase),
            "opened_at": self._succession.generation.opened_at,
            "error": self._start_state().reason or view.error,
            "workers": list(rows.values()),
            "suspicions": [str(each) for each in self._fleet.suspicions.growing(time.monotonic())]
            + self._router_vigil.growing(),
            "loop_failures": loop_failures(self._failures.describe(), self._worker_failures, routers),
            "routers": routers,
            "pairs": [(pair.prefill_worker_id, pair.decode_worker_id, pair.epoch) for pair in view.pairs],
        }

    async def _describe_workers(self) -> list[dict[str, Any]]:
        fleet, timeout_s = self._fleet, self.config.worker_timeout_s
        return list(
            await asyncio.gather(*(describe_worker(fleet, i, timeout_s) for i in self._membership.view.workers))
        )

    async def check_integrity(self) -> dict[str, list[str]]:
        """Per worker, what is wrong with its block accounting; empty lists if nothing is."""
        return await check_workers(self._fleet, self._membership.view.workers)

    async def stop(self) -> None:
        """End every worker and see its process gone; this actor is then killed by the caller. Idempotent."""
        self._tasks.cancel()
        await self._fleet.stop()

    # SuccessionOwner

    async def num_running(self) -> int:
        """See SuccessionOwner, as the next ones. A worker that does not answer counts as one that runs something."""
        answers = await self._describe_workers()
        return sum(
            answer["running"] + answer["waiting"] + len(answer.get("leases", ())) if "running" in answer else 1
            for answer in answers
        )

    async def held(self) -> list[Held]:
        return await self._fleet.held()

    async def stop_workers(self) -> None:
        await self._fleet.stop()
        self._make_fleet()
        self.on_change()

    async def end(self, reason: str) -> None:
        logger.warning("%s ends: %s", self.app_name, reason)
        await self._fleet.stop()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def waits(self, reason: str) -> None:
        if self._startup.waits("", reason):
            self._membership.changed()
            self.on_change()

    def fails(self, error: Exception) -> None:
        self._startup.failed("", str(error), error)
        self._membership.changed()
        self.on_change()

    def phase_changed(self) -> None:
        self._membership.changed()
        self.on_change()

    # FleetOwner

    def on_change(self) -> None:
        """See FleetOwner."""
        self._wake.set()
        self._wake = asyncio.Event()

    def on_heartbeat(self, worker_id: str, heartbeat: Heartbeat) -> None:
        """See FleetOwner. A worker's session with a router is that router's sign of life."""
        self._worker_failures[worker_id] = heartbeat.loop_failures
        self._router_vigil.sessions_seen(heartbeat.routers)
        if heartbeat.routers:
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
            self._succession.may_start = await self._fleet.adopt()
            self._adopted.set()
            self.on_change()
        while True:
            self._fleet.may_start = self._succession.may_start or not self.detached
            if self._fleet.may_start:
                self._startup.cleared("")
            self._fleet.tick()
            self._router_vigil.tick()
            await self._note_failure()
            if self.detached and (reason := self._wanted.reason_to_end(time.monotonic())) is not None:
                await self.check_current()
                await self.end(f"it is no longer wanted ({reason})")
            await asyncio.sleep(TICK_S)

    async def _hand_over(self) -> None:
        """Between the configurations of this application: see Succession."""
        await self._adopted.wait()
        await self._succession.run()

    async def _note_failure(self) -> None:
        """A generation that cannot start gives back what others have made room of."""
        generation, failed = self._succession.generation, self._start_state().failed or None
        if failed and generation.failed is None:
            generation.failed = failed
            await self._succession.withdraw()
        generation.failed = failed

    def _end_superseded(self, error: SupersededError) -> None:
        logger.error("%s: %s: ending", self.app_name, error)
        os._exit(1)

    def _task_failed(self, error: BaseException) -> None:
        logger.error("%s: internal error", self.app_name, exc_info=error)

    async def _changed(self, timeout_s: float) -> None:
        """Returns after the next change, or the timeout."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
