"""Workers of the simulated application: their starts and ends, as a Coordinator's hands carry them out.

One may be the guest of another, in whose memory it computes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from supervision_parts import (
    LOAD_S,
    ORPHANED_AFTER_S,
    ROUND_TRIP_S,
    START_TIMEOUT_S,
    STEP_S,
    WORKER_TIMEOUT_S,
    Coordinator,
    Worker,
)

from pdray.control.effects import Connect, Start, TellGone
from pdray.control.suspicions import Suspicions
from pdray.wire.cluster_view import WorkerInfo


class Starts:
    """See the module. What it needs of the world is declared here."""

    now: float
    rng: random.Random
    problems: list[str]
    workers: dict[str, Worker]
    _suspicions: Callable[[float], Suspicions]

    def _fails(self) -> bool:
        raise NotImplementedError

    def _expect(self, me: Coordinator, worker: Worker) -> None:
        raise NotImplementedError

    def _start(self, me: Coordinator, start: Start) -> None:
        worker_id, incarnation, lender = start
        memory: Worker | None = None
        if worker_id in me.table.guests:
            if lender is None:
                self.problems.append(f"{worker_id} was started before its lender")
                return
            memory = self.workers[lender.worker_id]
            if not memory.alive or memory.incarnation != lender.incarnation:
                me.table.start_failed(worker_id, incarnation, "its lender is gone")
                return
        elif any(other.alive and other.lender is not None for other in self.workers.values()):
            self.problems.append(f"{incarnation} was started beside a guest of its predecessor")
        if self._fails() or ((taken := self.workers.get(worker_id)) is not None and taken.alive):
            me.table.start_failed(worker_id, incarnation, "injected")
            return
        fixed = "both", "", 0, 0, "", "", "", 8, 16, 1024, 8, 64
        info = WorkerInfo(worker_id, incarnation, *fixed, lender="" if memory is None else memory.incarnation)
        loaded_at = self.now + self.rng.uniform(0.0, LOAD_S)
        worker = Worker(
            worker_id, incarnation, info=info, loaded_at=loaded_at, masters=self._suspicions(STEP_S), lender=memory
        )
        worker.masters.expect(self.now, "masters", "", ORPHANED_AFTER_S, sign="", next="")
        self.workers[worker_id] = worker
        me.loading[worker] = self.now + START_TIMEOUT_S

    def _await_loading(self, me: Coordinator) -> None:
        for worker, deadline in list(me.loading.items()):
            if worker.runs and worker.loaded_at <= self.now:
                assert worker.info is not None
                me.table.ready(worker.info)
                self._expect(me, worker)
            elif worker.alive and self.now < deadline:
                continue
            else:
                me.table.start_failed(worker.name, worker.incarnation, "died" if not worker.alive else "hung")
            del me.loading[worker]

    def _kill(self, me: Coordinator, worker_id: str, incarnation: str) -> None:
        if self._fails():
            me.table.kill_failed(self.now, incarnation, "injected")
            return
        worker = me.strays.get(incarnation, self.workers.get(worker_id))
        if worker is not None and worker.alive and (incarnation in me.strays or worker.incarnation == incarnation):
            is_well = worker.longest_idle_s < WORKER_TIMEOUT_S - ROUND_TRIP_S and not worker.stopped_at
            if is_well and (worker.lender is None or self._is_kept(me, worker.lender)):
                self.problems.append(f"{worker.incarnation} was killed, and was not sick")
            worker.alive = False
        me.table.died(self.now, worker_id, incarnation)

    def _join(self, me: Coordinator, effect: Connect | TellGone) -> None:
        """Connect two workers, or tell one of the other's end."""
        if isinstance(effect, TellGone):
            me.table.told(*effect)
            return
        prefill, decode = (self.workers[info.worker_id] for info in effect[:2])
        ids = prefill.name, decode.name, effect.epoch
        current = [prefill.incarnation, decode.incarnation] == [info.incarnation for info in effect[:2]]
        if not current or not (prefill.alive and decode.alive) or self._fails():
            me.table.connect_failed(self.now, *ids, "injected")
            return
        if prefill.lender is not decode:
            self.problems.append(f"{prefill.incarnation} is connected to {decode.incarnation}, and no guest of it")
        me.table.connected(*ids)

    @staticmethod
    def _is_kept(me: Coordinator, worker: Worker) -> bool:
        """Whether the Coordinator goes on with this very process."""
        return (
            worker.alive
            and me.table.is_current(worker.name, worker.incarnation)
            and (me.table.states()[worker.name] == "ready")
        )

    def check_lenders(self) -> None:
        """No guest outlives its lender."""
        for worker in self.workers.values():
            if worker.alive and worker.lender is not None and self.workers[worker.lender.name] is not worker.lender:
                self.problems.append(f"{worker.incarnation} has outlived {worker.lender.incarnation}")
