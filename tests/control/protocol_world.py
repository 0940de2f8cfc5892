"""A simulated cluster around the real control code: leases, prefill ledger, membership, and routers as a whole.

Time, network, processes, engines and channels are simulated; every decision is taken by the code under test. An
action is chosen from those that are possible; after each, violations() says what must never be. Puts write straight
into the decode worker's blocks when they complete, with no check by the receiver: the harshest channel.

Some requests are poison: every step that computes one of them fails, or every step of decoding. An engine that fails
either ends the legs of that step and goes on, or says whose step it was and dies.
"""

from __future__ import annotations

import functools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from pdray.config import Config
from pdray.control.credit import CreditWaiters
from pdray.control.effects import Connect, FlushPuts, Kill, Release, Send, Start, StartCompute, TellGone
from pdray.control.lease_table import LeaseTable
from pdray.control.losses import blame
from pdray.control.membership import Membership, Stray
from pdray.control.prefill_ledger import PrefillLedger
from pdray.engine.request import EngineRequest, Reservation
from pdray.outputs import SampledToken
from pdray.sampling_params import SamplingParams
from pdray.testing.simulated_router import Held, SimulatedRouter
from pdray.wire.cluster_view import Draining, WorkerIdentity, WorkerInfo
from pdray.wire.lease_messages import (
    CloseLease,
    Credit,
    EndCompletion,
    LeaseRequest,
    LegTokens,
    RenewLeases,
    Tokens,
)
from pdray.wire.message import LegKey, Verdict
from pdray.wire.messages import AnyMessage
from pdray.wire.peers import Role
from pdray.wire.prefill_messages import CancelPrefill, FirstTokens, LeaseConfirmed, Ping, Pong, PrefillRequest
from pdray.wire.put_messages import AbortPut, BeginPut, BeginPutReply, PutAborted, PutDone
from pdray.wire.worker_news import StepFailed

LEASE_TIMEOUT_S = 10.0
BLOCK_SIZE = 16
NUM_BLOCKS = (12, 4)  # by walk: much at once, and routers that wait for each other's credit
BLOCKS_PER_LEG = 2
OUTPUT_TOKENS = 4
LAYER_GROUPS = 3
ALONE_STEPS = 2
MAX_QUEUE_SIZE = 4
DRAIN_S = 3.0
PROGRESS_WEIGHT = 30  # or kills and stops would leave nothing that could get anywhere


def token(request_id: str, index: int, position: int) -> int:
    """What every worker samples there: replays must agree."""
    return hash((request_id, index, position)) % 1000


def sampled(request_id: str, index: int, position: int) -> SampledToken:
    finish = "length" if position == OUTPUT_TOKENS - 1 else None
    return SampledToken(index, position, token(request_id, index, position), finish_reason=finish)


class Pool:
    """An allocator that remembers who owns each block."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.owner: dict[int, LegKey] = {}
        self.requests: dict[LegKey, EngineRequest] = {}
        self.running: dict[LegKey, dict[int, int]] = {}  # leg -> index -> next position
        self.alone: dict[LegKey, int] = {}  # steps of its own that a leg still gets
        self.had_turn = False  # the last step was of one leg alone

    def reserve(self, request: EngineRequest) -> Reservation | None:
        free = [block for block in range(self.num_blocks) if block not in self.owner]
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
    pool: Pool = field(init=False)
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
class RouterProcess(Process):
    """Attributes:
    seen: version of the view that it was shown last, and whether the workers were draining then.
    """

    router: SimulatedRouter = field(init=False)
    seen: tuple[int, bool] = (-1, False)


@functools.cache
def router_config(num_prefill: int, num_decode: int) -> Config:
    """Nothing is lost for good and nobody waits for too long: what is forgotten shows as a request without an end."""
    return Config(
        skip_tokenizer_init=True,
        mode="disaggregated" if num_prefill else "colocated",
        num_prefill_workers=num_prefill or 1,
        num_decode_workers=num_decode,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
        max_queue_size=MAX_QUEUE_SIZE,
        max_queue_wait_s=1e9,
        max_replays=1000,
        lease_timeout_s=LEASE_TIMEOUT_S,
    )


class World:
    """Args:
    num_prefill: 0 is colocated. num_blocks: of each worker.
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
    ) -> None:
        self.now = 0.0
        self._num_blocks = num_blocks
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
        self.problems: list[str] = []
        self.num_requests = 0
        self.disturb = True
        self.draining = False  # as routers are shown it
        self.routers = [self._router(f"router-{i}", router_config(num_prefill, num_decode)) for i in range(2)]
        self.processes.update({router.name: router for router in self.routers})
        self._pump()

    # processes

    def _router(self, name: str, config: Config) -> RouterProcess:
        process = RouterProcess(name, "1")

        def send(held: Held, message: AnyMessage) -> None:
            worker = self._at(held)
            if worker is not None and worker.alive:
                self.links.setdefault((process, worker), deque()).append(message)

        def hang_up(held: Held) -> None:
            if (worker := self._at(held)) is not None:
                self._session_lost(process, worker)

        process.router = SimulatedRouter(config, name, send, hang_up, token, self.poison)
        return process

    def _at(self, held: Held) -> Process | None:
        """The process at the other end of a router's session."""
        worker = self.processes.get(held.worker_id)
        return worker if worker is not None and worker.incarnation == held.incarnation else None

    def workers(self, kind: type[Any]) -> list[Any]:
        return [process for process in self.processes.values() if isinstance(process, kind)]

    def _start(self, start: Start) -> None:
        process: Process
        if start.worker_id.startswith("prefill"):
            process = PrefillProcess(start.worker_id, start.incarnation, ledger=self._ledger())
            role = Role.PREFILL
        else:
            process = decode = DecodeProcess(start.worker_id, start.incarnation, waiters=self._waiters())
            decode.pool = Pool(self._num_blocks)
            decode.table = self._table(decode.pool, lambda: credit(decode.pool), LEASE_TIMEOUT_S, BLOCK_SIZE)
            role = Role.DECODE if self.membership.num_prefill else Role.BOTH
        self.processes[start.worker_id] = process
        info = WorkerInfo(
            start.worker_id, start.incarnation, role, "", 0, 0, "", "", "", self._num_blocks, 16, 1024, 8, 64
        )
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

    # messages

    def _send(self, source: Process, effects: list[Send]) -> None:
        for effect in effects:
            destination = self.processes.get(effect.to)
            if destination is not None and destination.alive and source.alive:
                if isinstance(source, DecodeProcess) and isinstance(destination, PrefillProcess):
                    entry = destination.epochs.get(source.name)
                    if entry is None or entry[1] is not source:
                        continue  # no session: dropped, and asked again when there is one
                if isinstance(destination, RouterProcess):
                    held = destination.router.sessions.get(source.name)
                    if held is None or held.incarnation != source.incarnation:
                        continue
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
            destination.router.receive(self.now, Held(source.name, source.incarnation), message)

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
            case EndCompletion():
                self._end_completion(decode, message.key, message.index)
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
            case Ping():
                self._send(prefill, [Send(source.name, Pong(len(prefill.computing)))])
            case LeaseConfirmed():
                self._ledger_do(prefill, ledger.lease_confirmed(message.key, message.num_cached_tokens))
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
            self._finish_if_done(decode, key)
        now = credit(decode.pool)
        self._decode_do(decode, [Send(router_id, Tokens(legs, now)) for router_id, legs in by_router.items()])

    def _end_completion(self, decode: DecodeProcess, key: LegKey, index: int) -> None:
        """A stop string, which only the router sees."""
        if key in decode.pool.running:
            decode.pool.running[key].pop(index, None)
            self._finish_if_done(decode, key)

    def _finish_if_done(self, decode: DecodeProcess, key: LegKey) -> None:
        if not decode.pool.running[key]:
            decode.pool.release(key)
            self._decode_do(decode, decode.table.finished(key))

    # routers

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
        for process in self.routers:
            if process.runs:
                process.router.tick(self.now)
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
        result += self._progress_of_routers()
        result += [lambda r=r: r.router.renew(self.now) for r in self.routers if r.runs and r.router.machine.requests]
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
        at_work = any(p.computing or p.puts or p.broken for p in prefills)
        at_work |= any(d.pool.running or d.broken for d in decodes)
        return not (self.links or self.calls or self.notices or at_work or self._progress_of_routers())

    def violations(self) -> list[str]:
        """What must never be, now."""
        for process in self.routers:
            self.problems += process.router.problems
            process.router.problems.clear()
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
        self.disturb = self.draining = False
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
            if prefill.alive and (len(prefill.ledger) or prefill.puts or prefill.held):
                self.problems.append(f"{prefill.name} still holds {prefill.ledger._legs}")
        return self.problems


def credit(pool: Pool) -> Credit:
    return Credit(pool.num_blocks - len(pool.owner), 8, len(pool.running), 0, len(pool.requests))


def walk(seed: int, steps: int, **world_options: Any) -> list[str]:
    """One random interleaving; what was violated, if anything."""
    rng = random.Random(seed)
    world = World(num_blocks=NUM_BLOCKS[seed % len(NUM_BLOCKS)], **world_options)
    for _ in range(steps):
        rng.choice(world.actions())()
        if problems := world.violations():
            return problems
    return world.settle(rng)
