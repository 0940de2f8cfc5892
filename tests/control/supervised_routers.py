"""Serve's side of the simulated application: router replicas, and what a Coordinator finds out about one.

Serve starts another replica in place of one that died. One that hangs it ends only after its health checks and the
grace, which is far too late. Replicas start, drain, and lose the way to their Coordinator; Serve itself falls silent.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from supervision_parts import (
    NUM_ROUTERS,
    ROUND_TRIP_S,
    STEP_S,
    WATCH_S,
    WORKER_TIMEOUT_S,
    Coordinator,
    Router,
)

from pdray.control.silent_routers import SILENT_LIMIT_S, EndRouter, Look
from pdray.control.suspicions import Suspicions

NOTICES_HANG_S = 14.0
GRACE_S = 65.0
ANSWER_TIMEOUT_S = 3.0
SICK_S = SILENT_LIMIT_S + ANSWER_TIMEOUT_S - ROUND_TRIP_S  # from the first question to the end of the second
LONGEST_STALL_S = SICK_S - STEP_S  # of a router that is not sick
CUT_S = 25.0


class Replicas:
    """Attributes:
    current: the replicas that Serve wants. all: those that it stops, too; and dead ones that it has not replaced.
    """

    def __init__(
        self,
        rng: random.Random,
        suspicions: Callable[[float], Suspicions],
        problems: list[str],
        *,
        asks_ray: bool,
    ) -> None:
        self.rng = rng
        self._suspicions = suspicions
        self._problems = problems
        self._asks_ray = asks_ray
        self._num_started = 0
        self._silent_until = 0.0
        self._processes: dict[str, Router] = {}  # all that ever were
        self._draining: list[Router] = []
        self.current = [self._start(f"router-{i}", 0.0) for i in range(NUM_ROUTERS)]

    @property
    def all(self) -> list[Router]:
        return self.current + self._draining

    def _start(self, name: str, opens_at: float) -> Router:
        self._num_started += 1
        router = Router(name, str(self._num_started), silent=self._suspicions(STEP_S), opens_at=opens_at)
        self._processes[router.router_id] = router
        return router

    def step(self, now: float, coordinator: Coordinator) -> None:
        """What Serve does with replicas that died, that hang, or that have drained."""
        for index, router in enumerate(self.current):
            if not router.alive:
                if router.replaced_at is None or router.replaced_at > now + WATCH_S:
                    router.replaced_at = now + self.rng.uniform(0.5, WATCH_S)
                elif router.replaced_at <= now:
                    self.current[index] = self._start(router.name, now + self.rng.uniform(1.0, 4.0))
            else:
                self._end_hung(now, router)
        for router in self._draining:
            self._end_hung(now, router)
            if router.runs and router.leaves_at is not None and router.leaves_at <= now:
                router.alive = False
                if not router.cut:
                    coordinator.left.append(router)
        self._draining = [router for router in self._draining if router.alive]

    @staticmethod
    def _end_hung(now: float, router: Router) -> None:
        if router.runs:
            router.replaced_at = None
        elif router.replaced_at is None:
            router.replaced_at = now + NOTICES_HANG_S + GRACE_S
        elif router.replaced_at <= now:
            router.alive, router.replaced_at = False, None

    def run(self, now: float, router: Router) -> None:
        """A router's own step: it answers what it was asked."""
        if router.cut and router.cut_until <= now:
            router.cut = ""
        for coordinator, look in router.questions:
            coordinator.found.append(look)
        router.questions.clear()

    # a Coordinator's hands

    @staticmethod
    def read(now: float, me: Coordinator) -> None:
        """What has come in."""
        for router in me.calls:
            me.routers.watched(now, router.router_id, router.process)
        for look in me.found:
            if me.looks.pop(look, None) is not None:
                me.routers.answered(now, look)
        for router in me.left:
            me.routers.left(router.router_id)
        me.calls.clear()
        me.found.clear()
        me.left.clear()

    @staticmethod
    def end_looks(now: float, me: Coordinator) -> None:
        """Questions that were not answered in time. As pdray.actors.questions.within: time asleep does not count."""
        for look, deadline in list(me.looks.items()):
            if now < deadline:
                continue
            if now - deadline > STEP_S:
                me.looks[look] = now + min(ANSWER_TIMEOUT_S, now - deadline)
            else:
                del me.looks[look]
                if (end := me.routers.silent(look)) is not None:
                    me.effects.append((now + STEP_S, end))

    def look(self, now: float, me: Coordinator, look: Look, *, fails: bool) -> None:
        router = self._processes[look.router_id]
        if fails:
            me.routers.unknown(look)
        elif not router.alive:
            me.routers.gone(look)
        elif self._silent_until > now or router not in self.all or router.cut == "failed":
            me.routers.unknown(look)
        else:
            me.looks[look] = now + ANSWER_TIMEOUT_S
            if router.cut != "lost":
                router.questions.append((me, look))

    def end(self, now: float, me: Coordinator, end: EndRouter, *, fails: bool) -> None:
        router = self._processes[end.router_id]
        if fails:
            me.routers.end_failed(end)
            return
        if self._asks_ray and not router.alive:
            me.routers.gone(end)
        elif me.routers.may_end(now, end):
            self._check(now, me, router)
            router.alive = False
            me.routers.gone(end)

    def _check(self, now: float, me: Coordinator, router: Router) -> None:
        """It is alive, and has hung for long, or has just woken up; or nobody at all hears of it."""
        who = f"{router.router_id} was ended"
        if not router.alive:
            self._problems.append(f"{who}, and was dead")
        if router.cut == "lost" and now - me.told.get(router.router_id, 0.0) > WORKER_TIMEOUT_S:
            return
        just_woken = router.was_idle_s >= SICK_S and now - router.ran_at <= ROUND_TRIP_S
        if router.idle_s < SICK_S and not just_woken:
            self._problems.append(f"{who}, and was not sick")

    # disturbances

    def disturbances(self, now: float) -> list[Callable[[], None]]:
        result: list[Callable[[], None]] = [lambda: setattr(self, "_silent_until", now + CUT_S)]
        for index, router in enumerate(self.current):
            if router.runs:
                for kind in ("answered", "failed", "lost"):
                    result.append(lambda r=router, k=kind: self._cut(now, r, k))
                result.append(lambda i=index: self._drain(now, i))
                result.append(lambda r=router: self._stall(now, r))
        return result

    def _cut(self, now: float, router: Router, kind: str) -> None:
        router.cut, router.cut_until = kind, now + CUT_S

    @staticmethod
    def _stall(now: float, router: Router) -> None:
        router.stopped_at, router.wakes_at = now, now + LONGEST_STALL_S

    def _drain(self, now: float, index: int) -> None:
        """Serve puts another in its place, and lets it end its streams."""
        router = self.current[index]
        router.leaves_at = now + self.rng.uniform(1.0, 30.0)
        self._draining.append(router)
        self.current[index] = self._start(router.name, now + self.rng.uniform(1.0, 4.0))
