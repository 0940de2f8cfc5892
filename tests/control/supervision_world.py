"""A simulated application around the real control code of supervision: who is silent, who may act, who is ended.

A Coordinator with its tables, colocated workers, routers, Serve, and Ray, which starts a Coordinator again that died.
Processes die, stop for good, or stop and wake up late; loops raise; effects fail; a node is given up while what runs
there sleeps. The code under test takes every decision; `problems` holds what must never be.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from supervised_routers import Replicas
from supervised_workers import Starts
from supervision_parts import (
    COORDINATOR_LIMIT_S,
    NUM_WORKERS,
    RAY_RESTART_S,
    ROUND_TRIP_S,
    SESSION_TIMEOUT_S,
    SETTLE_S,
    START_TIMEOUT_S,
    STEP_S,
    WATCH_S,
    WORKER_TIMEOUT_S,
    Coordinator,
    Process,
    Router,
    Worker,
)

from pdray.control.effects import Connect, Kill, Start, TellGone
from pdray.control.membership import Membership, Stray
from pdray.control.silent_routers import EndRouter, Look, SilentRouters
from pdray.control.suspicions import Suspicions
from pdray.wire.cluster_view import WorkerIdentity, WorkerLoading


class World(Starts):
    """Args:
    suspicions, silent_routers: the classes under test, or mutants of them.
    fenced: a Coordinator asks Ray before it acts. vigilant: routers end a Coordinator that hangs.
    orphans_ask_routers: a worker is no orphan while it has a session with a router.
    asks_ray: before it ends a router, a Coordinator asks whether it is there.
    guests: one worker computes in the other's memory; members: the table under test.
    """

    def __init__(
        self,
        seed: int,
        suspicions: Callable[[float], Suspicions] = Suspicions,
        silent_routers: Callable[[float, float], SilentRouters] = SilentRouters,
        *,
        fenced: bool = True,
        vigilant: bool = True,
        orphans_ask_routers: bool = True,
        asks_ray: bool = True,
        guests: bool = False,
        members: type[Membership] = Membership,
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.problems: list[str] = []
        self._suspicions, self._silent_routers = suspicions, silent_routers
        self._fenced, self._vigilant, self._orphans_ask_routers = fenced, vigilant, orphans_ask_routers
        self._guests, self._members = guests, members
        self.workers: dict[str, Worker] = {}  # by worker id: who has the name
        self.serve = Replicas(self.rng, suspicions, self.problems, asks_ray=asks_ray)
        self.former: list[Coordinator] = []
        self.disturb = True
        self._restart_at: float | None = None
        self.coordinator = self._new_coordinator(1)

    # Ray

    def _new_coordinator(self, generation: int) -> Coordinator:
        new = Coordinator("coordinator", str(generation), generation=generation)
        numbers = (1, NUM_WORKERS - 1) if self._guests else (0, NUM_WORKERS)
        new.table = self._members(*numbers, 0.5, generation, {"prefill-0": "decode-0"} if self._guests else {})
        new.suspicions = self._suspicions(STEP_S)
        new.routers = self._silent_routers(STEP_S, WORKER_TIMEOUT_S)
        new.adopts_at = self.now + WORKER_TIMEOUT_S
        self._restart_at = None
        return new

    def _ray(self) -> None:
        """Starts the actor again whose process died."""
        if not self.coordinator.alive and self._restart_at is None:
            self._restart_at = self.now + RAY_RESTART_S
        if self._restart_at is not None and self._restart_at <= self.now:
            self.former.append(self.coordinator)
            self.coordinator = self._new_coordinator(self.coordinator.generation + 1)

    def give_node_up(self) -> None:
        """Ray starts a Coordinator elsewhere while this one sleeps on a node that does not answer."""
        self._restart_at = self.now

    # one step of everything

    def step(self) -> None:
        self.now += STEP_S
        self.serve.step(self.now, self.coordinator)
        everybody: list[Process] = [*self.workers.values(), *self.serve.all, self.coordinator, *self.former]
        for process in everybody:
            if process.stopped_at is not None and process.wakes_at is not None and process.wakes_at <= self.now:
                process.stopped_at = process.wakes_at = None
            if process.pause or not process.runs:
                process.idle_s += STEP_S
            elif process.idle_s:
                process.was_idle_s, process.ran_at, process.idle_s = process.idle_s, self.now, 0.0
            process.longest_idle_s = max(process.longest_idle_s, process.idle_s)
        self._ray()
        self.rng.shuffle(everybody)
        for process in everybody:
            if not process.runs:
                continue
            if process.pause:
                process.pause -= 1
                continue
            match process:
                case Worker():
                    self._worker(process)
                case Router():
                    self._router(process)
                case Coordinator():
                    self._supervise(process)

    def _worker(self, worker: Worker) -> None:
        for coordinator in worker.asked_by:
            worker.masters.heard(self.now, "masters", "")
            sessions = [router.router_id for router in self.serve.all if self._has_session(router)]
            coordinator.answers.append((worker, sessions))
        worker.asked_by.clear()
        if self._orphans_ask_routers and any(self._has_session(router) for router in self.serve.all):
            worker.masters.heard(self.now, "masters", "")
        if worker.masters.due(self.now):
            if any(self._has_session(router) for router in self.serve.all):
                self.problems.append(f"{worker.incarnation} ended as an orphan while routers used it")
            worker.alive = False

    def _has_session(self, router: Router) -> bool:
        silent_since = self.now if router.stopped_at is None else router.stopped_at
        return router.alive and router.opens_at <= self.now and self.now - silent_since < SESSION_TIMEOUT_S

    def _router(self, router: Router) -> None:
        """As pdray.actors.vigil: the process that is silent twice in a row is ended."""
        coordinator = self.coordinator
        self.serve.run(self.now, router)
        if router.opens_at > self.now:
            return
        if router.cut:  # its calls fail
            coordinator.watches.pop(router, None)
            router.suspect = None
            return
        if router not in coordinator.watches:  # the last call was answered, or failed with its process
            coordinator.watches[router] = self.now + self.rng.uniform(STEP_S, WATCH_S)
            coordinator.calls.append(router)
            router.suspect = None
            router.silent.expect(self.now, "coordinator", "", COORDINATOR_LIMIT_S, sign="", next="")
        if not self._vigilant or not router.silent.due(self.now) or not coordinator.alive:
            return
        if router.suspect is coordinator:
            if coordinator.longest_idle_s < 2 * COORDINATOR_LIMIT_S - WATCH_S - ROUND_TRIP_S:
                self.problems.append(f"{coordinator.name} {coordinator.incarnation} was ended, and was not sick")
            coordinator.alive = False
        router.suspect = coordinator

    def _supervise(self, me: Coordinator) -> None:
        """A process that wakes up reads what lies ready before or after it looks at its table."""
        parts = [self._read, self._look]
        self.rng.shuffle(parts)
        if me.adopts_at is None:
            for part in parts:
                part(me)
        else:
            me.identified |= {worker for worker in self.workers.values() if worker.runs and not worker.pause}
            if me.adopts_at <= self.now:
                self._adopt(me)
        if me is self.coordinator:
            me.watches = {router: until for router, until in me.watches.items() if until > self.now}  # or answered
        self._carry_out(me)

    def _adopt(self, me: Coordinator) -> None:
        if me is not self.coordinator and self._fenced:
            me.alive = False
            return
        identities, strays, loading = [], [], []
        for worker in self.workers.values():
            if not worker.alive:
                continue
            if worker in me.identified:
                assert worker.info is not None
                if worker.loaded_at > self.now:
                    loading.append(WorkerLoading(worker.name, worker.incarnation, "", worker.info.lender))
                    me.loading[worker] = self.now + START_TIMEOUT_S
                else:
                    identities.append(WorkerIdentity(worker.info, "", {}, []))
                    self._expect(me, worker)
            else:
                strays.append(Stray(worker.name, f"{worker.name} of a former Coordinator"))
                me.strays[strays[-1].incarnation] = worker
        me.adopts_at = None
        me.table.adopt(identities, strays, loading)

    def _expect(self, me: Coordinator, worker: Worker) -> None:
        me.suspicions.expect(self.now, worker.name, worker.incarnation, WORKER_TIMEOUT_S, sign="", next="")

    def _read(self, me: Coordinator) -> None:
        for worker, router_ids in me.answers:
            me.asked.discard(worker.incarnation)
            me.suspicions.heard(self.now, worker.name, worker.incarnation)
            for router_id in router_ids:
                me.told[router_id] = self.now
                me.routers.session_seen(self.now, router_id)
        me.answers.clear()
        self.serve.read(self.now, me)

    def _look(self, me: Coordinator) -> None:
        for suspicion in me.suspicions.due(self.now):
            me.suspicions.forget(suspicion.who, suspicion.incarnation)
            me.table.suspect(suspicion.who, suspicion.incarnation)
        for worker in self.workers.values():
            if me.table.is_current(worker.name, worker.incarnation) and me.table.states()[worker.name] == "ready":
                if worker.alive and worker.incarnation not in me.asked:
                    me.asked.add(worker.incarnation)
                    worker.asked_by.append(me)
                elif not worker.alive:  # join() has ended
                    me.suspicions.forget(worker.name, worker.incarnation)
                    me.table.suspect(worker.name, worker.incarnation)
        self.serve.end_looks(self.now, me)
        self._await_loading(me)
        for effect in [*me.table.tick(self.now), *me.routers.tick(self.now)]:
            me.effects.append((self.now + STEP_S * self.rng.randint(1, 4), effect))

    def _carry_out(self, me: Coordinator) -> None:
        due = [effect for at, effect in me.effects if at <= self.now]
        me.effects = [(at, effect) for at, effect in me.effects if at > self.now]
        for effect in due:
            if me is not self.coordinator:
                if self._fenced:
                    me.alive = False
                    return
                self.problems.append(f"a former Coordinator carried out {effect}")
            match effect:
                case Start():
                    self._start(me, effect)
                case Connect() | TellGone():
                    self._join(me, effect)
                case Kill(worker_id, incarnation):
                    self._kill(me, worker_id, incarnation)
                case Look():
                    self.serve.look(self.now, me, effect, fails=self._fails())
                case EndRouter():
                    self.serve.end(self.now, me, effect, fails=self._fails())

    def _fails(self) -> bool:
        return self.disturb and self.rng.random() < 0.2

    # disturbances

    def disturbances(self) -> list[Callable[[], None]]:
        result = self.serve.disturbances(self.now)
        for process in (*self.workers.values(), *self.serve.all, self.coordinator):
            if process.runs:
                result += [
                    lambda p=process: self.stop(p, None),
                    lambda p=process: self.stop(p, self.rng.uniform(0.3, 3.0)),
                    lambda p=process: self.stop(p, 10.0),
                    lambda p=process: self.stop(p, 90.0),
                    lambda p=process: setattr(p, "pause", self.rng.randint(1, 3)),
                ]
            if process.alive:
                result.append(lambda p=process: setattr(p, "alive", False))
        result += [self._lose_workers] * 3
        if self.coordinator.stopped_at is not None and self.coordinator.alive:
            result += [self.give_node_up] * 3
        return result

    def _lose_workers(self) -> None:
        """All at once: their node is lost, and nobody tells of sessions with routers."""
        for worker in self.workers.values():
            worker.alive = False

    def stop(self, process: Process, seconds: float | None) -> None:
        """SIGSTOP; and SIGCONT after so long, or never."""
        process.stopped_at, process.wakes_at = self.now, None if seconds is None else self.now + seconds

    @property
    def whole(self) -> bool:
        """Whether every part is there and answers."""
        return (
            self.coordinator.runs
            and self.coordinator.adopts_at is None
            and self.coordinator.table.serving
            and len(self.workers) == NUM_WORKERS
            and all(router.runs and router.opens_at <= self.now for router in self.serve.current)
            and all(worker.runs for worker in self.workers.values())
        )

    def settle(self) -> list[str]:
        """No more disturbances; what is stopped for good stays so. Then all is whole again, and stays so."""
        self.disturb = False
        until = self.now + SETTLE_S
        while self.now < until and not self.problems:
            self.step()
        if not self.whole:
            states = self.coordinator.table.states()
            self.problems.append(f"not whole {SETTLE_S:g} s after the last disturbance: {states}")
        self.check_lenders()
        return self.problems


def walk(seed: int, steps: int, disturbance_rate: float = 0.05, **options: Any) -> list[str]:
    """One random interleaving; what was violated, if anything."""
    world = World(seed, **options)
    for _ in range(steps):
        if world.rng.random() < disturbance_rate and (choices := world.disturbances()):
            world.rng.choice(choices)()
        world.step()
        if world.problems:
            return world.problems
    return world.settle()
