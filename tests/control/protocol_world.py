"""A simulated cluster around the real control code: leases, prefill ledger, membership, and routers as a whole.

Time, network, processes, engines and channels are simulated; every decision is taken by the code under test. An
action is chosen from those that are possible; after each, violations() says what must never be.

Some requests are poison: every step that computes one of them fails, or every step of decoding. An engine that fails
either ends the legs of that step and goes on, or says whose step it was and dies.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from msgspec import structs
from protocol_cluster import Cluster
from protocol_processes import (
    DRAIN_S,
    LEASE_TIMEOUT_S,
    NUM_BLOCKS,
    OUTPUT_TOKENS,
    DecodeProcess,
    PrefillProcess,
    Process,
    RouterProcess,
)

from pdray.sampling_params import SamplingParams
from pdray.testing.simulated_router import Held
from pdray.wire.cluster_view import Draining
from pdray.wire.message import LegKey
from pdray.wire.worker_news import StepFailed

RENEW_INTERVAL_S = LEASE_TIMEOUT_S / 3
SETTLE_ROUNDS = 20  # six times as long as leases stand
PROGRESS_WEIGHT = 30  # or kills and stops would leave nothing that could get anywhere


class World(Cluster):
    """A cluster in which anything may happen next. Arguments: those of Cluster."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_requests = 0
        self.disturb = True
        self.draining = False  # as routers are shown it

    def submit(self, process: RouterProcess, n: int, poison: bool = False) -> None:
        request_id = f"request-{self.num_requests}"
        self.num_requests += 1
        if poison:
            self.poison[request_id] = self.num_requests % 2 == 0
        stop_at = None if poison or self.num_requests % 3 else self.num_requests % OUTPUT_TOKENS
        params = SamplingParams(n=n, seed=1, max_tokens=OUTPUT_TOKENS)
        process.router.submit(self.now, request_id, params, stop_at=stop_at)

    def abort(self, process: RouterProcess, request_id: str) -> None:
        process.router.abort(self.now, process.router.machine.requests[request_id])

    def stop_router(self, process: RouterProcess) -> None:
        """In order: everything of it ends, and is told so."""
        process.router.stop(self.now)
        if process.router.machine.requests:
            self.problems.append(f"{process.name} has stopped with {list(process.router.machine.requests)}")
        self.kill(process, process.incarnation)

    def cut_router(self, process: RouterProcess, held: Held) -> None:
        """The session between a router and a live worker is lost for good."""
        if (worker := self._at(held)) is not None:
            self._session_lost(process, worker)
        process.router.lose(self.now, held)

    def show_view(self, process: RouterProcess) -> None:
        view = self.membership.view
        process.seen = view.version, self.draining
        draining = Draining("a newer configuration comes", DRAIN_S) if self.draining else None
        process.router.view(self.now, structs.replace(view, draining=draining))

    def fire(self, process: RouterProcess) -> None:
        """It is the time for which a router has asked to be woken."""
        self.now = max(self.now, process.router.timers[0])
        process.router.tick(self.now)

    def _progress_of_routers(self) -> list[Callable[[], None]]:
        version = self.membership.view.version
        result: list[Callable[[], None]] = []
        for process in self.routers:
            if process.runs:
                if process.seen != (version, self.draining):
                    result.append(lambda p=process: self.show_view(p))
                if process.router.timers:
                    result.append(lambda p=process: self.fire(p))
                for worker_id, info in process.router.wanted.items():
                    worker = self._at(Held(worker_id, info.incarnation))
                    if worker is not None and worker.runs:
                        result.append(lambda p=process, name=worker_id: p.router.open(name))
        return result

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for decode in self.workers(DecodeProcess):
            if decode.runs:
                self._decode_do(decode, decode.table.expire(self.now))
        for prefill in self.workers(PrefillProcess):
            if prefill.runs:
                epochs = {name: epoch for name, (epoch, _) in prefill.epochs.items()}
                self.membership.open_channels(prefill.name, epochs)
        for process in self.routers:
            if process.runs:
                process.router.tick(self.now)
        self._pump()

    def actions(self) -> list[Callable[[], None]]:
        """Everything that could happen next."""
        result: list[Callable[[], None]] = [lambda: self.advance(0.5)]
        if self.calls:
            result += [self.carry_out] * 3
        if self.notices:
            result += [lambda: self.notices.popleft()()] * 3
        result += [lambda ends=ends: self.deliver(ends) for ends in self.links if ends[1].runs]
        for prefill in self.workers(PrefillProcess):
            if prefill.computes:
                result += [lambda p=prefill, key=key: self.compute(p, key) for key in prefill.computing]
            if prefill.runs:
                result += [lambda p=prefill, put=put: self.finish_put(p, put) for put in prefill.puts]
                result += [lambda p=prefill, key=key: self.end_step(p, key) for key in prefill.leaving]
        result += [lambda d=d: self.step(d) for d in self.workers(DecodeProcess) if d.computes and d.pool.running]
        result += [
            lambda p=p: self.bury(p) for p in self.processes.values() if p.broken and p.alive and self._is_heard(p)
        ]
        result += self._progress_of_routers()
        result += [lambda r=r: r.router.renew(self.now) for r in self.routers if r.runs and r.router.machine.requests]
        return result * PROGRESS_WEIGHT + self._submissions() + self._disturbances() if self.disturb else result

    def carry_on(self) -> None:
        """Everything that is under way, and prefills; nothing is decoded, and only routers' timers let time pass."""
        while True:
            prefills = self.workers(PrefillProcess)
            if self.calls:
                self.carry_out()
            elif self.notices:
                self.notices.popleft()()
            elif self.links:
                self.deliver(next(iter(self.links)))
            elif progress := self._progress_of_routers():
                progress[0]()
            elif computing := [(prefill, key) for prefill in prefills for key in prefill.computing]:
                self.compute(*computing[0])
            elif puts := [(prefill, put) for prefill in prefills for put in prefill.puts]:
                self.finish_put(*puts[0])
            else:
                return

    def _is_heard(self, worker: Process) -> bool:
        """Whether every router that runs has its last word."""
        heard = (ends for ends in self.links if ends[0] is worker and ends[1].runs)
        return not any(isinstance(message, StepFailed) for ends in heard for message in self.links[ends])

    def _submissions(self) -> list[Callable[[], None]]:
        weight = PROGRESS_WEIGHT // 4 if self.membership.serving else 1
        result = [lambda r=r, n=n: self.submit(r, n) for r in self.routers if r.runs for n in (1, 2)] * weight
        return result + [lambda r=r, n=n: self.submit(r, n, True) for r in self.routers if r.runs for n in (1, 2)]

    def _disturbances(self) -> list[Callable[[], None]]:
        result: list[Callable[[], None]] = [lambda: self.advance(LEASE_TIMEOUT_S / 2), self.crash_coordinator]
        result += [self.fail] * 3 if self.calls else []
        result += [lambda: setattr(self, "draining", not self.draining)] * (4 if self.draining else 1)
        for process in self.routers:
            if process.runs:
                some = list(process.router.machine.requests)[:2]
                result += [lambda p=process, name=name: self.abort(p, name) for name in some]
                sessions = process.router.sessions.values()
                result += [lambda p=process, held=held: self.cut_router(p, held) for held in sessions]
        for process in self.processes.values():
            if not process.alive:
                if not isinstance(process, RouterProcess):
                    result.append(lambda p=process: self._suspect(p))
                continue
            result += [lambda p=process: setattr(p, "stopped", not p.stopped)] * (4 if process.stopped else 1)
            if process is not self.routers[0]:
                result.append(lambda p=process: self.kill(p, p.incarnation))
            if process is self.routers[1] and process.runs:
                result.append(lambda p=process: self.stop_router(p))
        for prefill in self.workers(PrefillProcess):
            if prefill.runs:
                result += [lambda p=prefill, name=name: self.cut(p, name) for name in prefill.epochs]
        return result

    def _is_idle(self) -> bool:
        prefills = [worker for worker in self.workers(PrefillProcess) if worker.alive]
        decodes = [worker for worker in self.workers(DecodeProcess) if worker.alive]
        at_work = any(p.computing or p.puts or p.leaving or p.broken for p in prefills)
        at_work |= any(d.pool.running or d.broken for d in decodes)
        return not (self.links or self.calls or self.notices or at_work or self._progress_of_routers())

    def violations(self) -> list[str]:
        """What must never be, now."""
        for process in self.routers:
            self.problems += process.router.problems
            process.router.problems.clear()
        for prefill in self.workers(PrefillProcess):
            if prefill.alive:
                self.check_guest(prefill)
                for put in prefill.puts:
                    if put.decode.alive:
                        self._check_target(put.key, put.decode, put.blocks)
        for decode in self.workers(DecodeProcess):
            if decode.alive:
                leased = {LegKey(info.request_id, info.attempt) for info in decode.table.leases(self.now)}
                if leased != set(decode.pool.requests):
                    self.problems.append(f"{decode.name}: leases {leased} but reservations {set(decode.pool.requests)}")
        return self.problems

    def settle(self, rng: random.Random) -> list[str]:
        """No more disturbances: all go on, the dead are noticed, what is under way arrives. Then nothing is held."""
        self.disturb = self.draining = False
        for process in list(self.processes.values()):
            process.stopped = False
        for process in list(self.processes.values()):
            if not process.alive and not isinstance(process, RouterProcess):
                self._suspect(process)
        for _ in range(SETTLE_ROUNDS):
            for _ in range(4000):
                if self._is_idle():
                    break
                if not (actions := self.actions()[1:]):  # the first only lets time pass
                    break
                rng.choice(actions)()
                if self.violations():
                    return self.problems
            self.advance(RENEW_INTERVAL_S)
            for process in self.routers:  # or a request that was forgotten would be replayed, as its lease expires
                if process.runs and process.router.machine.requests:
                    process.router.renew(self.now)
        if not self.membership.serving:
            self.problems.append(f"never whole again: {self.membership.states()}, {self.membership.troubles()}")
        for router in self.routers:
            if router.alive and (requests := router.router.machine.requests):
                self.problems.append(f"{router.name}: requests without an outcome: {list(requests)}")
            if router.alive and router.router.machine.queue_depth:
                self.problems.append(f"{router.name}: {router.router.machine.queue_depth} legs wait for nobody")
        for decode in self.workers(DecodeProcess):
            if decode.alive and (decode.pool.owner or decode.table.leases(self.now)):
                self.problems.append(f"{decode.name} still holds {decode.table.leases(self.now)}")
            dead = decode.writers.keys() - {p.incarnation for p in self.workers(PrefillProcess) if p.alive}
            if decode.alive and dead:
                self.problems.append(f"{decode.name} was never told of the end of {dead}")
        for prefill in self.workers(PrefillProcess):
            lender = prefill.lender
            if prefill.alive and lender is not None and self.processes[lender.name] is not lender:
                self.problems.append(f"{prefill.name} has outlived {lender.incarnation}")
            if prefill.alive and (len(prefill.ledger) or prefill.puts or prefill.held):
                self.problems.append(f"{prefill.name} still holds {prefill.ledger._legs}")
        return self.problems


def walk(seed: int, steps: int, **world_options: Any) -> list[str]:
    """One random interleaving; what was violated, if anything."""
    rng = random.Random(seed)
    world = World(num_blocks=NUM_BLOCKS[seed % len(NUM_BLOCKS)], **world_options)
    for _ in range(steps):
        rng.choice(world.actions())()
        if problems := world.violations():
            return problems
    return world.settle(rng)
