"""A simulated cluster: the Coordinator's effects, sessions that break, and processes that die."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from msgspec import structs
from protocol_processes import (
    BLOCK_SIZE,
    LEASE_TIMEOUT_S,
    NUM_BLOCKS,
    DecodeProcess,
    Pool,
    PrefillProcess,
    Process,
    RouterProcess,
    credit,
    router_config,
    token,
)
from protocol_workers import Workers

from pdray.config import Config
from pdray.control.credit import CreditWaiters
from pdray.control.effects import Connect, Kill, Start, TellGone
from pdray.control.lease_table import LeaseTable
from pdray.control.losses import blame
from pdray.control.membership import Membership, Stray
from pdray.control.prefill_ledger import PrefillLedger
from pdray.testing.simulated_router import Held, SimulatedRouter
from pdray.wire.cluster_view import WorkerIdentity, WorkerInfo
from pdray.wire.message import LegKey, Verdict
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import Role


class Cluster(Workers):
    """Workers and routers that the real membership starts, connects and ends.

    Args:
        num_prefill: 0 is colocated.
        num_blocks: of each worker.
        guests: prefill workers compute in the pool of the only decode worker.
        table, ledger, members, waiters, blame: what is under test, or mutants of it.
    """

    def __init__(
        self,
        num_prefill: int = 2,
        num_decode: int = 2,
        table: type[LeaseTable] = LeaseTable,
        ledger: type[PrefillLedger] = PrefillLedger,
        members: type[Membership] = Membership,
        waiters: type[CreditWaiters] = CreditWaiters,
        blame: Callable[[list[LegKey]], Verdict] = blame,
        num_blocks: int = NUM_BLOCKS[0],
        guests: bool = False,
    ) -> None:
        super().__init__(blame)
        self._num_blocks = num_blocks
        self._table, self._ledger, self._waiters, self._members = table, ledger, waiters, members
        lenders = {f"prefill-{i}": "decode-0" for i in range(num_prefill)} if guests else {}
        self.membership = members(num_prefill, num_decode, backoff_s=0.01, guests=lenders)
        self.calls: deque[Any] = deque()  # the Coordinator's effects, through Ray: in order, lost with it
        self.strays: dict[str, Process] = {}  # that the Coordinator found and does not know, by the name it gave them
        self.notices: deque[Callable[[], None]] = deque()  # of broken sessions
        self.routers = [self._router(f"router-{i}", router_config(num_prefill, num_decode)) for i in range(2)]
        self.processes.update({router.name: router for router in self.routers})
        self._pump()

    def _router(self, name: str, config: Config) -> RouterProcess:
        process = RouterProcess(name, "1")

        def send(held: Held, message: AnyMessage) -> None:
            worker = self._at(held)
            if worker is not None and worker.alive:
                self.links.setdefault((process, worker), deque()).append(message)

        def hang_up(held: Held) -> None:
            if (worker := self._at(held)) is not None:
                self._session_lost(process, worker)

        process.router = SimulatedRouter(config, name, send, hang_up, token, self.poison, self.prefilled)
        return process

    def _at(self, held: Held) -> Process | None:
        """The process at the other end of a router's session."""
        worker = self.processes.get(held.worker_id)
        return worker if worker is not None and worker.incarnation == held.incarnation else None

    def _start(self, start: Start) -> None:
        process: Process
        lender = ""
        if start.worker_id.startswith("prefill"):
            process = PrefillProcess(start.worker_id, start.incarnation, ledger=self._ledger())
            role = Role.PREFILL
            if start.worker_id in self.membership.guests:
                if start.lender is None:
                    self.problems.append(f"{start.worker_id} was started before its lender")
                    return
                process.lender, lender = self.processes[start.lender.worker_id], start.lender.incarnation  # type: ignore
                if process.lender.incarnation != lender or not process.lender.alive:  # type: ignore[union-attr]
                    self.membership.start_failed(start.worker_id, start.incarnation, "its lender is gone")
                    return
                process.ledger = self._ledger(is_guest=True)
        else:
            guests = [p for p in self.workers(PrefillProcess) if p.alive and p.lender is not None]
            self.problems += [f"{start.incarnation} was started beside {p.incarnation}" for p in guests]
            process = decode = DecodeProcess(start.worker_id, start.incarnation, waiters=self._waiters())
            decode.pool = Pool(self._num_blocks)
            decode.table = self._table(decode.pool, lambda: credit(decode.pool), LEASE_TIMEOUT_S, BLOCK_SIZE)
            role = Role.DECODE if self.membership.num_prefill else Role.BOTH
        self.processes[start.worker_id] = process
        info = WorkerInfo(
            start.worker_id, start.incarnation, role, "", 0, 0, "", "", "", self._num_blocks, 16, 1024, 8, 64
        )
        info = structs.replace(info, lender=lender)
        process.info = info
        self.membership.ready(info)

    def crash_coordinator(self) -> None:
        """It dies with all it was about to do, and is started again: it keeps the workers that answer, and ends the
        ones that do not."""
        self.calls.clear()
        identities, strays = [], []
        for process in list(self.processes.values()):
            if isinstance(process, RouterProcess) or not process.alive:
                continue
            if process.stopped:
                strays.append(Stray(process.name, f"silent-{self.membership.generation}-{process.name}"))
                self.strays[strays[-1].incarnation] = process
                continue
            assert process.info is not None
            if isinstance(process, DecodeProcess):
                identity = WorkerIdentity(process.info, "", process.table.epochs(), list(process.writers.values()))
            else:
                assert isinstance(process, PrefillProcess)
                epochs = {name: epoch for name, (epoch, _) in process.epochs.items()}
                identity = WorkerIdentity(process.info, "", epochs, [])
            identities.append(identity)
        former = self.membership
        self.membership = self._members(
            former.num_prefill, former.num_decode, 0.01, former.generation + 1, former.guests
        )
        self.membership.adopt(identities, strays)
        assert self.membership.view.version > former.view.version
        self._pump()

    def _pump(self) -> None:
        self.calls += self.membership.tick(self.now)

    def carry_out(self) -> None:
        """The Coordinator's next effect, and its report."""
        effect = self.calls.popleft()
        match effect:
            case Start():
                self._start(effect)
            case Kill(worker_id, incarnation):
                process = self.strays.get(incarnation, self.processes.get(worker_id))
                if process is not None:
                    self.kill(process, process.incarnation if incarnation in self.strays else incarnation)
                self.membership.died(self.now, worker_id, incarnation)
            case Connect():
                self._connect(effect)
            case TellGone(worker_id, incarnation, gone):
                if self.processes[worker_id].incarnation == incarnation:
                    self._tell_gone(self.processes[worker_id], gone)
                self.membership.told(worker_id, incarnation, gone)
        self._pump()

    def fail(self) -> None:
        """The Coordinator's next effect comes to nothing: an exception, a deadline, a node that does not answer."""
        effect = self.calls.popleft()
        match effect:
            case Start(worker_id, incarnation):
                self.membership.start_failed(worker_id, incarnation, "injected")
            case Kill(_, incarnation):
                self.membership.kill_failed(self.now, incarnation, "injected")
            case Connect(prefill, decode, epoch):
                self.membership.connect_failed(self.now, prefill.worker_id, decode.worker_id, epoch, "injected")
            case TellGone(worker_id, incarnation, gone):
                self.membership.tell_failed(self.now, worker_id, incarnation, gone, "injected")
        self._pump()

    def _connect(self, connect: Connect) -> None:
        prefill, decode = self.processes[connect.prefill.worker_id], self.processes[connect.decode.worker_id]
        current = (
            prefill.incarnation == connect.prefill.incarnation and decode.incarnation == connect.decode.incarnation
        )
        if not (current and prefill.alive and decode.alive):
            self.membership.connect_failed(self.now, prefill.name, decode.name, connect.epoch)
            return
        assert isinstance(prefill, PrefillProcess) and isinstance(decode, DecodeProcess)
        decode.writers[prefill.incarnation] = connect.prefill
        if prefill.lender not in (None, decode):
            self.problems.append(f"{prefill.incarnation} is connected to {decode.incarnation}, and is no guest of it")
        writer = prefill.name, prefill.incarnation, connect.epoch
        self._send(decode, decode.table.set_writer(*writer, is_guest=prefill.lender is not None))
        self._disconnect(prefill, decode.name)
        prefill.epochs[decode.name] = (connect.epoch, decode)
        self._send(decode, decode.table.link_restored(prefill.name))
        self.membership.connected(prefill.name, decode.name, connect.epoch)

    def _disconnect(self, prefill: PrefillProcess, decode_name: str) -> None:
        """As the worker does it: the channel is closed, which ends its puts, and then the ledger hears."""
        entry = prefill.epochs.pop(decode_name, None)
        if entry is not None:
            for put in [put for put in prefill.puts if put.decode is entry[1]]:
                self._finish_put(prefill, put, error="closed")
            self.links.pop((prefill, entry[1]), None)
            self.links.pop((entry[1], prefill), None)
        self._ledger_do(prefill, prefill.ledger.decode_worker_gone(decode_name))

    def _tell_gone(self, peer: Process, gone: WorkerInfo) -> None:
        if not peer.alive:
            return
        if isinstance(peer, DecodeProcess):
            peer.writers.pop(gone.incarnation, None)
            self._decode_do(peer, peer.table.worker_gone(gone.worker_id, gone.incarnation))
        elif isinstance(peer, PrefillProcess):
            entry = peer.epochs.get(gone.worker_id)
            if entry is None or entry[1].incarnation == gone.incarnation:
                self._disconnect(peer, gone.worker_id)

    def kill(self, process: Process, incarnation: str) -> None:
        """SIGKILL: nothing of it goes on; its sessions break, and routers hear of it."""
        if process.incarnation != incarnation or not process.alive:
            return
        process.alive = False
        if isinstance(process, PrefillProcess):
            process.puts.clear()
        self.links = {ends: queue for ends, queue in self.links.items() if process not in ends}
        for router in self.routers:
            if router.alive and router is not process:
                self.notices.append(lambda router=router, process=process: self._router_loses(router, process))
        if isinstance(process, RouterProcess):
            for worker in (*self.workers(DecodeProcess), *self.workers(PrefillProcess)):
                self.notices.append(lambda worker=worker: self._worker_lost_router(worker, process.name))

    def _router_loses(self, router: RouterProcess, worker: Process) -> None:
        if router.alive:
            router.router.lose(self.now, Held(worker.name, worker.incarnation))

    def _session_lost(self, router: RouterProcess, worker: Process) -> None:
        """The worker's end of a session between the two: what was under way is lost."""
        self.links.pop((router, worker), None)
        self.links.pop((worker, router), None)
        self._worker_lost_router(worker, router.name)

    def _worker_lost_router(self, worker: Process, router_id: str) -> None:
        if isinstance(worker, DecodeProcess) and worker.alive:
            worker.waiters.router_gone(router_id)
            self._decode_do(worker, worker.table.router_gone(router_id))
        elif isinstance(worker, PrefillProcess) and worker.alive:
            self._ledger_do(worker, worker.ledger.router_gone(router_id))

    def _suspect(self, process: Process) -> None:
        self.membership.suspect(process.name, process.incarnation)
        self._pump()

    def bury(self, worker: Process) -> None:
        """The Coordinator has learned that its engine is broken."""
        self._suspect(worker)

    def cut(self, prefill: PrefillProcess, decode_name: str) -> None:
        """The session between two live workers is lost for good."""
        self._disconnect(prefill, decode_name)
