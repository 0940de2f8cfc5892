"""The Coordinator's table: which workers there should be, which there are, and how they are connected.

A worker goes ABSENT → STARTING → READY → DYING → ABSENT. It is DYING from the first sign of trouble until
its process was seen dead; only then do its peers hear that it is gone, and only then is another
process started under its name. Every connection of a pair has a higher epoch than the one before.

Pure: time and events go in, effects come out. Single-threaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from pdray.control.effects import Connect, Kill, MembershipEffect, Start, TellGone
from pdray.wire.cluster_view import ClusterView, Pair, WorkerIdentity, WorkerInfo, WorkerLoading

MAX_BACKOFF_S = 30.0
RETRY_S = 0.5  # before a kill, or the news of a death, is tried again
VERSIONS_PER_GENERATION = 1_000_000


class WorkerState(StrEnum):
    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    DYING = "dying"


class Stray(NamedTuple):
    """A process that a former table has left, which cannot be kept and was not seen dead.

    Attributes:
        incarnation: its own where that is known, else any name that no other process has.
        info: of a writer that a kept worker has named.
    """

    worker_id: str
    incarnation: str
    info: WorkerInfo | None = None


@dataclass(slots=True)
class _Work:
    """An effect that is owed until it is reported done."""

    under_way: bool = False
    due_at: float = 0.0
    trouble: str | None = None  # why it failed last

    def take(self, now: float) -> bool:
        """Whether it is to be carried out now."""
        if self.under_way or self.due_at > now:
            return False
        self.under_way = True
        return True

    def failed(self, now: float, reason: str) -> None:
        self.under_way, self.due_at, self.trouble = False, now + RETRY_S, reason


@dataclass(slots=True)
class _Worker:
    state: WorkerState = WorkerState.ABSENT
    incarnation: str = ""
    info: WorkerInfo | None = None
    start_at: float = 0.0
    num_failures: int = 0  # in a row, without having been ready
    kill: _Work | None = None  # while it is DYING
    to_tell: dict[str, tuple[WorkerInfo, _Work]] = field(default_factory=dict)  # of whose death, by incarnation


@dataclass(slots=True)
class _Pair:
    epoch: int = 0
    connected: bool = False
    connecting: bool = False
    retry_at: float = 0.0


@dataclass(slots=True)
class Membership:
    """Args:
    num_prefill, num_decode: how many of each; num_prefill 0 is colocated.
    backoff_s: wait before the first restart; doubles with every failure in a row, up to 30 s.
    generation: higher than that of the table whose place this one takes.
    guests: workers that compute in the memory of another one, by its id: they are started once that one is ready, and
        end with it; it is not started again before they have, because they hold memory that it needs.
    """

    num_prefill: int
    num_decode: int
    backoff_s: float
    generation: int = 0
    guests: Mapping[str, str] = field(default_factory=dict)
    _workers: dict[str, _Worker] = field(default_factory=dict, init=False)
    _strays: dict[str, tuple[Stray, _Work]] = field(default_factory=dict, init=False)  # by incarnation
    _pairs: dict[tuple[str, str], _Pair] = field(default_factory=dict, init=False)
    _version: int = field(default=0, init=False)
    _num_started: int = field(default=0, init=False)
    _error: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        prefill = [f"prefill-{i}" for i in range(self.num_prefill)]
        decode = [f"decode-{i}" for i in range(self.num_decode)]
        self._workers = {worker_id: _Worker() for worker_id in prefill + decode}
        self._pairs = {(p, d): _Pair() for p in prefill for d in decode}
        self._version = self.generation * VERSIONS_PER_GENERATION

    @property
    def view(self) -> ClusterView:
        """The view for routers: ready workers and connected pairs."""
        return ClusterView(
            self._version,
            [w.info for w in self._workers.values() if w.state is WorkerState.READY and w.info is not None],
            [Pair(p, d, pair.epoch) for (p, d), pair in self._pairs.items() if pair.connected],
            None if self.serving else self._error,
        )

    @property
    def serving(self) -> bool:
        """Whether every worker is ready and every pair connected."""
        return all(w.state is WorkerState.READY for w in self._workers.values()) and all(
            pair.connected for pair in self._pairs.values()
        )

    def note_error(self, text: str) -> None:
        """Note what kept a worker from starting or a pair from connecting."""
        self._error = text
        self._version += 1

    def changed(self) -> None:
        """Raise the view's version for a change of something that is told with it but is not in this table."""
        self._version += 1

    @property
    def worker_ids(self) -> list[str]:
        return list(self._workers)

    def states(self) -> dict[str, str]:
        return {worker_id: str(worker.state) for worker_id, worker in self._workers.items()}

    def is_current(self, worker_id: str, incarnation: str) -> bool:
        return self._workers[worker_id].incarnation == incarnation

    def troubles(self) -> dict[str, str]:
        """Operations that are being retried, and their reasons, by worker id."""
        found = {stray.worker_id: work.trouble for stray, work in self._strays.values() if work.trouble}
        for worker_id, worker in self._workers.items():
            owed = [work for _, work in worker.to_tell.values()] + ([] if worker.kill is None else [worker.kill])
            for work in owed:
                if work.trouble is not None:
                    found[worker_id] = work.trouble
        return found

    def tick(self, now: float, *, may_start: bool = True) -> list[MembershipEffect]:
        """Effects that are due: processes to end, workers to start, pairs to connect, deaths to tell. Call after every
        event and from time to time.

        Args:
            may_start: there is room for workers; without it none is started.
        """
        effects: list[MembershipEffect] = []
        self._error = None if self.serving else self._error  # a later trouble is not this one's
        for incarnation, (stray, work) in self._strays.items():
            if work.take(now):
                effects.append(Kill(stray.worker_id, incarnation))
        names_taken = {stray.worker_id for stray, _ in self._strays.values()}
        for worker_id, worker in self._workers.items():
            if worker.kill is not None and worker.kill.take(now):
                effects.append(Kill(worker_id, worker.incarnation))
            absent = worker.state is WorkerState.ABSENT and worker_id not in names_taken
            if may_start and absent and worker.start_at <= now and self._may_start(worker_id, names_taken):
                worker.state, worker.incarnation = WorkerState.STARTING, self._new_incarnation(worker_id)
                lender = self._workers[self.guests[worker_id]].info if worker_id in self.guests else None
                effects.append(Start(worker_id, worker.incarnation, lender))
            for gone, work in worker.to_tell.values():
                if work.take(now):
                    effects.append(TellGone(worker_id, worker.incarnation, gone))
        for (prefill_id, decode_id), pair in self._pairs.items():
            prefill, decode = self._workers[prefill_id], self._workers[decode_id]
            both = prefill.state is decode.state is WorkerState.READY
            if both and not pair.connected and not pair.connecting and pair.retry_at <= now:
                assert prefill.info is not None and decode.info is not None
                pair.epoch, pair.connecting = pair.epoch + 1, True
                effects.append(Connect(prefill.info, decode.info, pair.epoch))
        return effects

    def adopt(
        self,
        identities: Sequence[WorkerIdentity],
        strays: Sequence[Stray] = (),
        loading: Sequence[WorkerLoading] = (),
    ) -> None:
        """Go on from what a former table has left: workers that live, and their channels.

        Args:
            loading: report ready() or start_failed() of each, as of those that this table starts.
            strays: processes under this table's names that cannot be kept. The writers that `identities` name, and that
                are not among them, are strays by themselves.
        """
        found = {identity.info.worker_id: identity for identity in identities}
        for worker_id, identity in found.items():
            worker = self._workers[worker_id]
            worker.state, worker.incarnation, worker.info = WorkerState.READY, identity.info.incarnation, identity.info
        for each in loading:
            worker = self._workers[each.worker_id]
            worker.state, worker.incarnation = WorkerState.STARTING, each.incarnation
        for (prefill_id, decode_id), pair in self._pairs.items():
            opened = found[prefill_id].epochs.get(decode_id, 0) if prefill_id in found else 0
            accepted = found[decode_id].epochs.get(prefill_id, 0) if decode_id in found else 0
            pair.epoch = max(opened, accepted)
            pair.connected = opened == accepted > 0 and found[prefill_id].info in found[decode_id].writers
        lenders = {identity.info.worker_id: identity.info.lender for identity in identities}
        for guest, lender in (lenders | {each.worker_id: each.lender for each in loading}).items():
            if lender and lender != self._workers[self.guests[guest]].incarnation:
                self.suspect(guest, self._workers[guest].incarnation)
        alive = {identity.info.incarnation for identity in identities}
        writers = [writer for identity in identities for writer in identity.writers if writer.incarnation not in alive]
        for stray in (*strays, *(Stray(writer.worker_id, writer.incarnation, writer) for writer in writers)):
            self._strays[stray.incarnation] = (stray, _Work())
        self._version += 1

    def ready(self, info: WorkerInfo) -> None:
        """A started worker is loaded and listens. A late report of an older process is ignored."""
        worker = self._workers[info.worker_id]
        if worker.incarnation != info.incarnation or worker.state is not WorkerState.STARTING:
            return
        worker.state, worker.info, worker.num_failures = WorkerState.READY, info, 0
        self._version += 1

    def start_failed(self, worker_id: str, incarnation: str, reason: str) -> None:
        """Note a failed start: the remains of the process are ended, and after a backoff it is tried again."""
        if self.is_current(worker_id, incarnation) and self._workers[worker_id].state is WorkerState.STARTING:
            self.note_error(f"{worker_id} did not start: {reason}")
        self.suspect(worker_id, incarnation)

    def suspect(self, worker_id: str, incarnation: str) -> None:
        """A worker failed, hangs, or is said to be dead: it leaves the view, and tick() has its death made sure of."""
        worker = self._workers[worker_id]
        if worker.incarnation != incarnation or worker.state not in (WorkerState.STARTING, WorkerState.READY):
            return
        worker.state, worker.kill = WorkerState.DYING, _Work()
        worker.to_tell.clear()
        self._disconnect(worker_id)
        self._version += 1
        for guest in self._guests_of(worker_id):
            if not self._has_own_memory(guest):
                self.suspect(guest, self._workers[guest].incarnation)

    def died(self, now: float, worker_id: str, incarnation: str) -> None:
        """Note that its process was seen dead: peers may free what it could have written; another is started."""
        worker = self._workers[worker_id]
        stray, _ = self._strays.pop(incarnation, (None, None))
        if stray is not None and stray.info is not None:
            self._tell_peers(stray.info)
        if worker.incarnation != incarnation or worker.state is WorkerState.ABSENT:
            return
        gone, worker.info, worker.kill = worker.info, None, None
        worker.state = WorkerState.ABSENT
        worker.start_at = now + min(MAX_BACKOFF_S, self.backoff_s * 2**worker.num_failures)
        worker.num_failures += 1
        worker.to_tell.clear()
        self._disconnect(worker_id)
        self._version += 1
        if gone is not None:
            self._tell_peers(gone)

    def kill_failed(self, now: float, incarnation: str, reason: str) -> None:
        """Note that its process was not seen dead: it stays DYING, and the kill is repeated."""
        for worker in self._workers.values():
            if worker.incarnation == incarnation and worker.kill is not None:
                worker.kill.failed(now, reason)
        if incarnation in self._strays:
            self._strays[incarnation][1].failed(now, reason)

    def told(self, worker_id: str, incarnation: str, gone: WorkerInfo) -> None:
        """Note that the peer's process knows of the death."""
        if self.is_current(worker_id, incarnation):
            self._workers[worker_id].to_tell.pop(gone.incarnation, None)

    def tell_failed(self, now: float, worker_id: str, incarnation: str, gone: WorkerInfo, reason: str) -> None:
        """Told again after a while, for as long as the process lives: what it holds back for the dead stays so."""
        worker = self._workers[worker_id]
        if worker.incarnation == incarnation and gone.incarnation in worker.to_tell:
            worker.to_tell[gone.incarnation][1].failed(now, reason)

    def connected(self, prefill_id: str, decode_id: str, epoch: int) -> None:
        pair = self._pairs[prefill_id, decode_id]
        if pair.epoch == epoch and pair.connecting:
            pair.connecting, pair.connected = False, True
            self._version += 1

    def connect_failed(self, now: float, prefill_id: str, decode_id: str, epoch: int, reason: str = "") -> None:
        """Tried again after the backoff, in a higher epoch."""
        pair = self._pairs[prefill_id, decode_id]
        if pair.epoch == epoch and pair.connecting:
            pair.connecting, pair.retry_at = False, now + self.backoff_s
            if reason:
                self.note_error(f"{prefill_id} could not be connected to {decode_id}: {reason}")

    def is_prefill(self, worker_id: str) -> bool:
        """Whether the worker computes prompts alone."""
        return any(prefill == worker_id for prefill, _ in self._pairs)

    def open_channels(self, prefill_id: str, epochs: dict[str, int]) -> None:
        """A prefill worker's open channels, by decode worker. A pair that lost its own is connected anew."""
        for (prefill, decode), pair in self._pairs.items():
            if prefill == prefill_id and pair.connected and epochs.get(decode) != pair.epoch:
                pair.connected = False
                self._version += 1

    def channel_broken(self, prefill_id: str, decode_id: str) -> None:
        """The pair's channel does not bring anything over: it is opened anew, in a higher epoch."""
        self._pairs[prefill_id, decode_id].connected = False
        self._version += 1

    def _may_start(self, worker_id: str, names_taken: set[str]) -> bool:
        """Whether a guest's lender is there, or a lender's former guests are gone."""
        if worker_id in self.guests:
            return self._workers[self.guests[worker_id]].state is WorkerState.READY
        guests = self._guests_of(worker_id)
        gone = (self._workers[guest].state is WorkerState.ABSENT or self._has_own_memory(guest) for guest in guests)
        return all(gone) and not names_taken.intersection(guests)

    def _guests_of(self, worker_id: str) -> list[str]:
        return [guest for guest, lender in self.guests.items() if lender == worker_id]

    def _has_own_memory(self, guest: str) -> bool:
        """It is ready, and its lender could lend nothing."""
        info = self._workers[guest].info
        return info is not None and not info.lender

    def _new_incarnation(self, worker_id: str) -> str:
        self._num_started += 1
        return f"{worker_id}.{self.generation}.{self._num_started}"

    def _tell_peers(self, gone: WorkerInfo) -> None:
        """A process that starts meanwhile never knew it."""
        peers = {p if d == gone.worker_id else d for p, d in self._pairs if gone.worker_id in (p, d)}
        for peer in (self._workers[peer] for peer in sorted(peers)):
            if peer.state is WorkerState.READY:
                peer.to_tell[gone.incarnation] = (gone, _Work())

    def _disconnect(self, worker_id: str) -> None:
        for ids, pair in self._pairs.items():
            if worker_id in ids:
                pair.connected = pair.connecting = False
