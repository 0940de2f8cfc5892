"""A simulated cluster around the real control code: leases, prefill ledger, request tracker, membership.

Time, network, processes, engines and channels are simulated; every decision is taken by the code under test. An
action is chosen from those that are possible; after each, violations() says what must never be. Puts write straight
into the decode worker's blocks when they complete, with no check by the receiver: the harshest channel.

Some requests are poison: every step that computes one of them fails, or every step of decoding. An engine that fails
either ends the legs of that step and goes on, or says whose step it was and dies.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pdray.control.credit import CreditWaiters, covers
from pdray.control.effects import Connect, FlushPuts, Kill, Release, Send, Start, StartCompute, TellGone
from pdray.control.lease_table import LeaseTable
from pdray.control.losses import Loss, Losses, blame
from pdray.control.membership import Membership, Stray
from pdray.control.prefill_ledger import PrefillLedger
from pdray.control.request_tracker import Leg, RequestTracker
from pdray.engine.request import EngineRequest, Reservation
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams
from pdray.wire.cluster_view import WorkerIdentity, WorkerInfo
from pdray.wire.lease_messages import (
    CloseLease,
    Credit,
    CreditUpdate,
    CreditWanted,
    LeaseClosed,
    LeaseDenied,
    LeaseGranted,
    LeaseRequest,
    LegTokens,
    RenewLeases,
    Tokens,
)
from pdray.wire.message import LegKey, Verdict
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, PrefillFailed, PrefillRequest
from pdray.wire.put_messages import AbortPut, BeginPut, BeginPutReply, PutAborted, PutDone
from pdray.wire.worker_news import StepFailed

LEASE_TIMEOUT_S = 10.0
BLOCK_SIZE = 16
NUM_BLOCKS = 12
BLOCKS_PER_LEG = 2
OUTPUT_TOKENS = 4
LAYER_GROUPS = 3
ALONE_STEPS = 2
MAX_REPLAYS = 1000
PROGRESS_WEIGHT = 30  # or kills and stops would leave nothing that could get anywhere


def token(request_id: str, index: int, position: int) -> int:
    """What every worker samples there: replays must agree."""
    return hash((request_id, index, position)) % 1000


def sampled(request_id: str, index: int, position: int) -> SampledToken:
    finish = "length" if position == OUTPUT_TOKENS - 1 else None
    return SampledToken(index, position, token(request_id, index, position), finish_reason=finish)


class Pool:
    """An allocator that remembers who owns each block."""

    def __init__(self) -> None:
        self.owner: dict[int, LegKey] = {}
        self.requests: dict[LegKey, EngineRequest] = {}
        self.running: dict[LegKey, dict[int, int]] = {}  # leg -> index -> next position
        self.alone: dict[LegKey, int] = {}  # steps of its own that a leg still gets
        self.had_turn = False  # the last step was of one leg alone

    def reserve(self, request: EngineRequest) -> Reservation | None:
        free = [block for block in range(NUM_BLOCKS) if block not in self.owner]
        if len(free) < BLOCKS_PER_LEG:
            return None
        assert request.key not in self.requests
        blocks = free[:BLOCKS_PER_LEG]
        self.requests[request.key] = request  # type: ignore[index]
        if request.alone:
            self.alone[request.key] = ALONE_STEPS  # type: ignore[index]
        self.owner.update(dict.fromkeys(blocks, request.key))  # type: ignore[arg-type]
        return Reservation(blocks, 0)

    def start_prefill(self, key: LegKey) -> None:
        request = self.requests[key]
        self.running[key] = {index: len(request.output_token_ids) for index in request.indices}

    def start_decode(self, key: LegKey, tokens: list[SampledToken]) -> None:
        assert {t.index for t in tokens} == set(self.requests[key].indices)
        self.running[key] = {t.index: t.position + 1 for t in tokens if t.finish_reason is None}

    def release(self, key: LegKey) -> None:
        self.requests.pop(key, None)
        self.running.pop(key, None)
        self.alone.pop(key, None)
        self.owner = {block: owner for block, owner in self.owner.items() if owner != key}

    def plan(self) -> list[LegKey]:
        """Legs of the next step: one that is to be alone, or, every other time, all others."""
        alone = [key for key in self.running if self.alone.get(key)]
        others = [key for key in self.running if key not in alone]
        self.had_turn = bool(alone) and not (others and self.had_turn)
        if not self.had_turn:
            return others
        self.alone[alone[0]] -= 1
        return alone[:1]


@dataclass(eq=False)
class Process:
    """name is a worker or router id. A dead process does nothing; a stopped one nothing until it goes on; one whose
    engine has broken computes nothing."""

    name: str
    incarnation: str
    alive: bool = True
    stopped: bool = False
    broken: bool = False
    info: WorkerInfo | None = None

    @property
    def runs(self) -> bool:
        return self.alive and not self.stopped

    @property
    def computes(self) -> bool:
        return self.runs and not self.broken


@dataclass(eq=False)
class DecodeProcess(Process):
    pool: Pool = field(default_factory=Pool)
    table: LeaseTable = field(init=False)
    waiters: CreditWaiters = field(default_factory=CreditWaiters)
    writers: dict[str, WorkerInfo] = field(default_factory=dict)  # by incarnation, until told of their death
    targets: dict[LegKey, list[int]] = field(default_factory=dict)  # blocks that a writer was let into


@dataclass(eq=False)
class PutInFlight:
    key: LegKey
    decode: DecodeProcess
    blocks: list[int]


@dataclass(eq=False)
class PrefillProcess(Process):
    ledger: PrefillLedger = field(default_factory=PrefillLedger)
    epochs: dict[str, tuple[int, DecodeProcess]] = field(default_factory=dict)
    computing: dict[LegKey, int] = field(default_factory=dict)  # layer groups left
    held: dict[LegKey, int] = field(default_factory=dict)
    puts: list[PutInFlight] = field(default_factory=list)


@dataclass(eq=False)
class Request:
    tracker: RequestTracker
    n: int
    patient: bool = True
    places: dict[LegKey, tuple[str | None, str | None]] = field(default_factory=dict)
    denied: set[LegKey] = field(default_factory=set)  # legs that wait for credit of the worker that denied them
    losses: Losses = field(default_factory=Losses)
    num_losses: dict[LegKey, int] = field(default_factory=dict)  # of the legs before it
    alone: set[LegKey] = field(default_factory=set)
    received: dict[int, list[int]] = field(default_factory=dict)
    outcomes: list[str] = field(default_factory=list)


@dataclass(eq=False)
class RouterProcess(Process):
    requests: dict[str, Request] = field(default_factory=dict)
    wanted: dict[str, CreditWanted] = field(default_factory=dict)  # by decode worker
    failed: set[str] = field(default_factory=set)  # incarnations that have said so


class World:
    """Args:
    num_prefill: 0 is colocated.
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
    ) -> None:
        self.now = 0.0
        self._table, self._ledger, self._waiters, self._blame = table, ledger, waiters, blame
        self._members = members
        self.poison: dict[str, bool] = {}  # whether it breaks prefill workers, too
        self.num_failures = 0
        self.membership = members(num_prefill, num_decode, backoff_s=0.01)
        self.processes: dict[str, Process] = {}
        self.links: dict[tuple[Process, Process], deque[Any]] = {}
        self.calls: deque[Any] = deque()  # the Coordinator's effects, through Ray: in order, lost with it
        self.strays: dict[str, Process] = {}  # that the Coordinator found and does not know, by the name it gave them
        self.notices: deque[Callable[[], None]] = deque()  # of broken sessions
        self.routers = [RouterProcess(f"router-{i}", "1") for i in range(2)]
        self.processes.update({router.name: router for router in self.routers})
        self.problems: list[str] = []
        self.num_requests = 0
        self.disturb = True
        self._pump()

    # processes

    def workers(self, kind: type[Any]) -> list[Any]:
        return [process for process in self.processes.values() if isinstance(process, kind)]

    def _start(self, start: Start) -> None:
        process: Process
        if start.worker_id.startswith("prefill"):
            process = PrefillProcess(start.worker_id, start.incarnation, ledger=self._ledger())
            role = "prefill"
        else:
            process = decode = DecodeProcess(start.worker_id, start.incarnation, waiters=self._waiters())
            decode.table = self._table(decode.pool, lambda: credit(decode.pool), LEASE_TIMEOUT_S, BLOCK_SIZE)
            role = "decode" if self.membership.num_prefill else "both"
        self.processes[start.worker_id] = process
        info = WorkerInfo(start.worker_id, start.incarnation, role, "", 0, 0, "", "", "", NUM_BLOCKS, 16, 1024, 8, 64)  # type: ignore[arg-type]
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
        self.membership = self._members(former.num_prefill, former.num_decode, 0.01, former.generation + 1)
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
        self._send(decode, decode.table.set_writer(prefill.name, prefill.incarnation, connect.epoch))
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
                self.notices.append(lambda router=router, process=process: self._router_lost(router, process))
        if isinstance(process, RouterProcess):
            for worker in (*self.workers(DecodeProcess), *self.workers(PrefillProcess)):
                self.notices.append(lambda worker=worker: self._worker_lost_router(worker, process.name))

    def _worker_lost_router(self, worker: Process, router_id: str) -> None:
        if isinstance(worker, DecodeProcess) and worker.alive:
            worker.waiters.router_gone(router_id)
            self._decode_do(worker, worker.table.router_gone(router_id))
        elif isinstance(worker, PrefillProcess) and worker.alive:
            self._ledger_do(worker, worker.ledger.router_gone(router_id))

    # messages

    def _send(self, source: Process, effects: list[Send]) -> None:
        for effect in effects:
            destination = self.processes.get(effect.to)
            if destination is not None and destination.alive and source.alive:
                if isinstance(source, DecodeProcess) and isinstance(destination, PrefillProcess):
                    entry = destination.epochs.get(source.name)
                    if entry is None or entry[1] is not source:
                        continue  # no session: dropped, and asked again when there is one
                self.links.setdefault((source, destination), deque()).append(effect.message)

    def deliver(self, ends: tuple[Process, Process]) -> None:
        source, destination = ends
        message = self.links[ends].popleft()
        if not self.links[ends]:
            del self.links[ends]
        if isinstance(destination, DecodeProcess):
            self._decode_receives(destination, source, message)
        elif isinstance(destination, PrefillProcess):
            self._prefill_receives(destination, source, message)
        elif isinstance(destination, RouterProcess):
            self._router_receives(destination, source, message)

    def _decode_receives(self, decode: DecodeProcess, source: Process, message: Any) -> None:
        table = decode.table
        match message:
            case LeaseRequest():
                self._decode_do(decode, table.request(self.now, source.name, message))
            case RenewLeases():
                table.renew(self.now, source.name, message.keys)
                answer = decode.waiters.renewed(source.name, message.wanted, credit(decode.pool))
                if not message.keys:  # or heartbeats would hide that somebody was forgotten
                    self._send(decode, [answer])
            case CloseLease():
                self._decode_do(decode, table.close(message.key))
            case BeginPut():
                # A channel may resolve positions now and write much later: what it writes to is what it was told here.
                self._send(decode, table.begin_put(source.name, message))
                places = table.resolve(message.key, source.name, message.epoch, range(BLOCKS_PER_LEG))
                if places is not None:
                    decode.targets[message.key] = places
            case PutDone():
                self._decode_do(decode, table.put_done(self.now, source.name, message))
            case PutAborted():
                self._decode_do(decode, table.put_aborted(source.name, message.key))

    def _decode_do(self, decode: DecodeProcess, effects: list[Send]) -> None:
        """As the worker does it: whoever waits hears of the credit that has come back."""
        self._send(decode, [*effects, *decode.waiters.announce(credit(decode.pool))])

    def _prefill_receives(self, prefill: PrefillProcess, source: Process, message: Any) -> None:
        ledger = prefill.ledger
        match message:
            case PrefillRequest():
                entry = prefill.epochs.get(message.decode_worker_id)
                self._ledger_do(prefill, ledger.request(source.name, message, None if entry is None else entry[0]))
            case CancelPrefill():
                self._ledger_do(prefill, ledger.cancel(message.key))
            case BeginPutReply():
                self._ledger_do(prefill, ledger.begin_put_reply(message.key, message.granted))
            case AbortPut():
                self._ledger_do(prefill, ledger.abort_put(source.name, message.key))

    def _ledger_do(self, prefill: PrefillProcess, effects: list[Any]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._send(prefill, [effect])
                case StartCompute(key):
                    prefill.computing[key] = LAYER_GROUPS
                case FlushPuts(key):
                    for _ in range(prefill.held.pop(key, 0)):
                        self._put(prefill, key)
                    self._ledger_do(prefill, prefill.ledger.puts_flushed(self.now, key))
                case Release(key):
                    prefill.computing.pop(key, None)
                    prefill.held.pop(key, None)
                    if any(put.key == key for put in prefill.puts):
                        self.problems.append(f"{key}: source blocks unpinned with a put in flight")

    # engines and channels

    def _put(self, prefill: PrefillProcess, key: LegKey) -> None:
        leg = prefill.ledger.leg(key)
        assert leg is not None and leg.decode_worker_id is not None
        prefill.ledger.put_issued(key)
        decode = prefill.epochs[leg.decode_worker_id][1]
        prefill.puts.append(PutInFlight(key, decode, decode.targets[key]))

    def compute(self, prefill: PrefillProcess, key: LegKey) -> None:
        """One layer group of one leg, and the first token after the last."""
        leg = prefill.ledger.leg(key)
        if leg is None:
            del prefill.computing[key]
            return
        if self.poison.get(key.request_id):
            self._engine_fails(prefill, [key] if leg.alone else self._shared_step(prefill))
            return
        if prefill.ledger.may_put(key):
            self._put(prefill, key)
        elif prefill.ledger.may_hold(key):
            prefill.held[key] = prefill.held.get(key, 0) + 1
        prefill.computing[key] -= 1
        if prefill.computing[key] == 0:
            del prefill.computing[key]
            position = len(leg.output_token_ids)
            tokens = [sampled(leg.request_id, index, position) for index in leg.indices]
            self._ledger_do(prefill, prefill.ledger.computed(self.now, FirstTokens(*key, tokens, 0, 0.0, 0.0)))

    def finish_put(self, prefill: PrefillProcess, put: PutInFlight) -> None:
        """The bytes land: in whatever the blocks belong to by now."""
        self._finish_put(prefill, put, error=None)

    def _finish_put(self, prefill: PrefillProcess, put: PutInFlight, error: str | None) -> None:
        prefill.puts.remove(put)
        if put.decode.alive:
            self._check_target(put.key, put.decode, put.blocks)
            entry = prefill.epochs.get(put.decode.name)
            if error is None and entry is not None and put.decode.table.may_write(put.key, prefill.name, entry[0]):
                self._decode_do(put.decode, put.decode.table.put_received(self.now, put.key))
        self._ledger_do(prefill, prefill.ledger.put_completed(put.key, error))

    def _check_target(self, key: LegKey, decode: DecodeProcess, blocks: list[int]) -> None:
        for block in blocks:
            if decode.pool.owner.get(block) != key:
                self.problems.append(f"{key} may write block {block}, which belongs to {decode.pool.owner.get(block)}")

    @staticmethod
    def _shared_step(prefill: PrefillProcess) -> list[LegKey]:
        """Legs that are computed together."""
        legs = {key: prefill.ledger.leg(key) for key in prefill.computing}
        return [key for key, leg in legs.items() if leg is not None and not leg.alone]

    def _engine_fails(self, worker: DecodeProcess | PrefillProcess, step: list[LegKey]) -> None:
        """Every other time it survives, and only the legs of the step end."""
        self.num_failures += 1
        if self.num_failures % 2:
            worker.broken = True
            for router in self.routers:
                self._send(worker, [Send(router.name, StepFailed("broken", step))])
            return
        for key in step:
            if isinstance(worker, DecodeProcess):
                worker.pool.release(key)
                self._send(worker, worker.table.failed(key, "broken", self._blame(step)))
            else:
                worker.computing.pop(key, None)
                self._ledger_do(worker, worker.ledger.fail(key, "broken", self._blame(step)))

    def bury(self, worker: Process) -> None:
        """The Coordinator has learned that its engine is broken."""
        self._suspect(worker)

    def step(self, decode: DecodeProcess) -> None:
        """One decode step: a token for every completion that it computes."""
        by_router: dict[str, list[LegTokens]] = {}
        plan = decode.pool.plan()
        if any(key.request_id in self.poison for key in plan):
            self._engine_fails(decode, plan)
            return
        for key in plan:
            positions = decode.pool.running[key]
            tokens = [sampled(key.request_id, index, position) for index, position in positions.items()]
            decode.pool.running[key] = {
                index: position + 1 for index, position in positions.items() if position + 1 < OUTPUT_TOKENS
            }
            router_id = decode.table.router_of(key)
            if router_id is None:
                self.problems.append(f"{key} runs without a lease")
                continue
            by_router.setdefault(router_id, []).append(LegTokens(*key, tokens))
            if not decode.pool.running[key]:
                decode.pool.release(key)
                self._send(decode, decode.table.finished(key))
        now = credit(decode.pool)
        self._decode_do(decode, [Send(router_id, Tokens(legs, now)) for router_id, legs in by_router.items()])

    # routers

    def submit(self, router: RouterProcess, n: int, poison: bool = False) -> None:
        request_id = f"request-{self.num_requests}"
        self.num_requests += 1
        if poison:
            self.poison[request_id] = self.num_requests % 2 == 0
        request = Request(RequestTracker(request_id, n), n, patient=self.num_requests % 4 > 0)
        router.requests[request_id] = request
        self._open(router, request, request.tracker.start())

    def _open(self, router: RouterProcess, request: Request, leg: Leg) -> None:
        view = self.membership.view
        pairs: list[tuple[str | None, str]] = [(p.prefill_worker_id, p.decode_worker_id) for p in view.pairs]
        pairs += [(None, worker.worker_id) for worker in view.workers if worker.role == "both"]
        pairs = [pair for pair in pairs if all(name is None or self._takes(router, name) for name in pair)]
        if not pairs:
            self._end(router, request, "failed")
            return
        place: tuple[str | None, str | None] = pairs[(self.num_requests + leg.key.attempt) % len(pairs)]
        if place[0] is not None and len(leg.output_token_ids) == OUTPUT_TOKENS - 1:
            place = (place[0], None)  # the first token ends it: no lease
        request.places[leg.key] = place
        if place[1] is None:
            self._ask_prefill(router, request, leg)
            return
        ask = LeaseRequest(
            *leg.key,
            [1],
            SamplingParams(n=request.n, seed=1),
            list(leg.indices),
            list(leg.output_token_ids),
            place[0],
            alone=leg.key in request.alone,
        )
        self._send(router, [Send(place[1], ask)])

    def _takes(self, router: RouterProcess, worker_id: str) -> bool:
        """Whether the router may ask it, as far as it knows."""
        process = self.processes[worker_id]
        return process.alive and process.incarnation not in router.failed

    def _end(self, router: RouterProcess, request: Request, outcome: str) -> None:
        request.outcomes.append(outcome)
        is_poison = request.tracker.request_id in self.poison
        if outcome == ("finished" if is_poison else "blamed"):
            self.problems.append(f"{request.tracker.request_id} {outcome}, poison: {is_poison}")
        for leg in request.tracker.drop():
            self._close(router, request, leg.key)
        del router.requests[request.tracker.request_id]

    def _close(self, router: RouterProcess, request: Request, key: LegKey) -> None:
        place = request.places.get(key)
        if place is not None:
            if place[1] is not None:
                self._send(router, [Send(place[1], CloseLease(*key, "over"))])
            if place[0] is not None:
                self._send(router, [Send(place[0], CancelPrefill(*key))])

    def abort(self, router: RouterProcess, request: Request) -> None:
        self._end(router, request, "aborted")

    def _router_lost(self, router: RouterProcess, dead: Process) -> None:
        """A session broke: legs that the dead worker had a part in are replayed."""
        if not router.alive:
            return
        router.wanted.pop(dead.name, None)
        for request in list(router.requests.values()):
            for leg in request.tracker.legs:
                if dead.name in request.places.get(leg.key, ()):
                    self._lose(router, request, leg.key, Loss("it died", dead.name))

    def _step_failed(self, router: RouterProcess, worker: Process, message: StepFailed) -> None:
        router.failed.add(worker.incarnation)
        suspects = [LegKey(*key) for key in message.suspects]
        for request in list(router.requests.values()):
            for leg in request.tracker.legs:
                if worker.name in request.places.get(leg.key, ()):
                    verdict = self._blame(suspects) if leg.key in suspects else "innocent"
                    self._lose(router, request, leg.key, Loss(message.reason, worker.name, verdict))

    def _lose(self, router: RouterProcess, request: Request, key: LegKey, loss: Loss) -> None:
        """As a router does it."""
        if request.outcomes:
            return
        before = request.losses.num
        request.losses.count(loss, request.num_losses.get(key, 0))
        if request.losses.num > before and loss.verdict != "lost":
            self.problems.append(f"{key}: {loss.verdict} counts")
        if loss.verdict == "suspect" and key in request.alone and request.tracker.request_id in self.poison:
            self.problems.append(f"{key} was to be alone, and was computed with others")
        if loss.verdict == "failed" or request.losses.num > MAX_REPLAYS:
            self._end(router, request, "blamed" if loss.verdict == "failed" else "failed")
            return
        alone = key in request.alone or loss.verdict == "suspect"
        self._close(router, request, key)
        for leg in request.tracker.replace(key):
            if request.outcomes:
                return
            request.num_losses[leg.key] = request.num_losses.get(key, 0) + 1
            if alone:
                request.alone.add(leg.key)
            self._open(router, request, leg)

    def _router_receives(self, router: RouterProcess, source: Process, message: Any) -> None:
        if isinstance(message, CreditUpdate):
            self._router_credit(router, source.name, message.credit)
            return
        if isinstance(message, Tokens):
            for update in message.updates:
                self._router_tokens(router, update.key, update.tokens)
            return
        if isinstance(message, StepFailed):
            self._step_failed(router, source, message)
            return
        request = router.requests.get(message.request_id)
        leg = next((leg for leg in request.tracker.legs if leg.key == message.key), None) if request else None
        if request is None or leg is None:
            if isinstance(message, LeaseGranted):
                self._send(router, [Send(source.name, CloseLease(*message.key, "nobody waits"))])
            return
        place = request.places[leg.key]
        match message:
            case LeaseGranted():
                if place[0] is not None:
                    self._ask_prefill(router, request, leg)
            case LeaseDenied():
                if message.retriable and request.patient:
                    request.denied.add(leg.key)
                    self._want(router, source.name)
                else:
                    self._end(router, request, "rejected")
            case FirstTokens():
                self._router_tokens(router, message.key, message.tokens)
            case LeaseClosed() | PrefillFailed():
                loss = Loss(message.reason, message.lost_worker_id or message.reason, message.verdict)
                self._lose(router, request, leg.key, loss)

    def _ask_prefill(self, router: RouterProcess, request: Request, leg: Leg) -> None:
        prefill, decode = request.places[leg.key]
        assert prefill is not None
        epochs = {(p.prefill_worker_id, p.decode_worker_id): p.epoch for p in self.membership.view.pairs}
        epoch = 0 if decode is None else epochs.get((prefill, decode), 0)
        params = SamplingParams(n=request.n, seed=1)
        indices, outputs = list(leg.indices), list(leg.output_token_ids)
        ask = PrefillRequest(*leg.key, [1], params, indices, outputs, decode, epoch, 0, alone=leg.key in request.alone)
        self._send(router, [Send(prefill, ask)])

    def _want(self, router: RouterProcess, decode: str) -> None:
        """Once, until the worker has told that it is there."""
        wanted = CreditWanted(BLOCKS_PER_LEG, 1)
        if router.wanted.get(decode) != wanted:
            router.wanted[decode] = wanted
            self._send(router, [Send(decode, RenewLeases([], wanted))])

    def _router_credit(self, router: RouterProcess, decode: str, told: Credit) -> None:
        """The first that waits for this worker asks again; the others wait on."""
        wanted = router.wanted.get(decode)
        if wanted is None or not covers(told, wanted.blocks, wanted.places):
            return
        del router.wanted[decode]
        waiting = [
            (request, leg)
            for request in router.requests.values()
            for leg in request.tracker.legs
            if leg.key in request.denied and request.places[leg.key][1] == decode
        ]
        for request, leg in waiting[:1]:
            request.denied.discard(leg.key)
            for again in request.tracker.replace(leg.key):  # it was denied, not lost: it is what it was
                request.num_losses[again.key] = request.num_losses.get(leg.key, 0)
                if leg.key in request.alone:
                    request.alone.add(again.key)
                self._open(router, request, again)
        if waiting[1:]:
            self._want(router, decode)

    def _router_tokens(self, router: RouterProcess, key: LegKey, tokens: list[SampledToken]) -> None:
        request = router.requests.get(key.request_id)
        if request is None:
            return
        for fresh in request.tracker.accept(key, tokens):
            received = request.received.setdefault(fresh.index, [])
            if fresh.position != len(received) or fresh.token_id != token(key.request_id, fresh.index, fresh.position):
                self.problems.append(f"{key}: position {fresh.position} after {len(received)} tokens")
            received.append(fresh.token_id)
        request.tracker.ended_legs()
        if request.tracker.done:
            if any(len(request.received[index]) != OUTPUT_TOKENS for index in range(request.n)):
                self.problems.append(f"{key}: ended with {request.received}")
            self._end(router, request, "finished")

    def renew(self, router: RouterProcess) -> None:
        keys: dict[str, list[LegKey]] = {}
        for request in router.requests.values():
            for leg in request.tracker.legs:
                if (decode := request.places[leg.key][1]) is not None:
                    keys.setdefault(decode, []).append(leg.key)
        self._send(router, [Send(name, RenewLeases(named, router.wanted.get(name))) for name, named in keys.items()])

    def _suspect(self, process: Process) -> None:
        self.membership.suspect(process.name, process.incarnation)
        self._pump()

    # time

    def advance(self, seconds: float) -> None:
        self.now += seconds
        for decode in self.workers(DecodeProcess):
            if decode.runs:
                self._decode_do(decode, decode.table.expire(self.now))
        for prefill in self.workers(PrefillProcess):
            if prefill.runs:
                epochs = {name: epoch for name, (epoch, _) in prefill.epochs.items()}
                self.membership.open_channels(prefill.name, epochs)
        self._pump()

    def cut(self, prefill: PrefillProcess, decode_name: str) -> None:
        """The session between two live workers is lost for good."""
        self._disconnect(prefill, decode_name)

    # actions

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
        result += [lambda d=d: self.step(d) for d in self.workers(DecodeProcess) if d.computes and d.pool.running]
        result += [
            lambda p=p: self.bury(p) for p in self.processes.values() if p.broken and p.alive and self._is_heard(p)
        ]
        result += [lambda r=router: self.renew(r) for router in self.routers if router.runs and router.requests]
        return result * PROGRESS_WEIGHT + self._submissions() + self._disturbances() if self.disturb else result

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
        for router in self.routers:
            if router.runs:
                result += [lambda r=router, q=q: self.abort(r, q) for q in list(router.requests.values())[:2]]
        for process in self.processes.values():
            if not process.alive:
                if not isinstance(process, RouterProcess):
                    result.append(lambda p=process: self._suspect(p))
                continue
            result += [lambda p=process: setattr(p, "stopped", not p.stopped)] * (4 if process.stopped else 1)
            if process is not self.routers[0]:
                result.append(lambda p=process: self.kill(p, p.incarnation))
        for prefill in self.workers(PrefillProcess):
            if prefill.runs:
                result += [lambda p=prefill, name=name: self.cut(p, name) for name in prefill.epochs]
        return result

    def _is_idle(self) -> bool:
        prefills = [worker for worker in self.workers(PrefillProcess) if worker.alive]
        decodes = [worker for worker in self.workers(DecodeProcess) if worker.alive]
        at_work = any(p.computing or p.puts or p.broken for p in prefills)
        at_work |= any(d.pool.running or d.broken for d in decodes)
        return not (self.links or self.calls or self.notices or at_work)

    def violations(self) -> list[str]:
        """What must never be, now."""
        for prefill in self.workers(PrefillProcess):
            if prefill.alive:
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
        self.disturb = False
        for process in list(self.processes.values()):
            process.stopped = False
        for process in list(self.processes.values()):
            if not process.alive and not isinstance(process, RouterProcess):
                self._suspect(process)
        for _ in range(6):
            for _ in range(4000):
                if self._is_idle():
                    break
                if not (actions := self.actions()[1:]):  # the first only lets time pass
                    break
                rng.choice(actions)()
                if self.violations():
                    return self.problems
            self.advance(LEASE_TIMEOUT_S + 1)
        if not self.membership.serving:
            self.problems.append(f"never whole again: {self.membership.states()}, {self.membership.troubles()}")
        for router in self.routers:
            if router.alive and router.requests:
                self.problems.append(f"{router.name}: requests without an outcome: {list(router.requests)}")
        for decode in self.workers(DecodeProcess):
            if decode.alive and (decode.pool.owner or decode.table.leases(self.now)):
                self.problems.append(f"{decode.name} still holds {decode.table.leases(self.now)}")
            dead = decode.writers.keys() - {p.incarnation for p in self.workers(PrefillProcess) if p.alive}
            if decode.alive and dead:
                self.problems.append(f"{decode.name} was never told of the end of {dead}")
        for prefill in self.workers(PrefillProcess):
            if prefill.alive and (len(prefill.ledger) or prefill.puts or prefill.held):
                self.problems.append(f"{prefill.name} still holds {prefill.ledger._legs}")
        return self.problems


def credit(pool: Pool) -> Credit:
    return Credit(NUM_BLOCKS - len(pool.owner), 8, len(pool.running), 0, len(pool.requests))


def walk(seed: int, steps: int, **world_options: Any) -> list[str]:
    """One random interleaving; what was violated, if anything."""
    rng = random.Random(seed)
    world = World(**world_options)
    for _ in range(steps):
        rng.choice(world.actions())()
        if problems := world.violations():
            return problems
    return world.settle(rng)
