"""The Coordinator's table: which workers there should be, which there are, and how they are connected.

A worker goes ABSENT → STARTING → READY → DYING → ABSENT. It is DYING from the first sign of trouble until
its process was seen dead; only then do its peers hear that it is gone, and only then is another
process started under its name. Every connection of a pair has a higher epoch than the one before.

Pure: time and events go in, effects come out. Single-threaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from pdray.cluster.messages import ClusterView, Pair, WorkerIdentity, WorkerInfo

MAX_BACKOFF_S = 30.0
VERSIONS_PER_GENERATION = 1_000_000


class WorkerState(StrEnum):
    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    DYING = "dying"


class Start(NamedTuple):
    """Create the worker's actor and load it, then report ready() or died()."""

    worker_id: str
    incarnation: str


class Kill(NamedTuple):
    """Make sure that this process is dead, then report died()."""

    worker_id: str
    incarnation: str


class Connect(NamedTuple):
    """Let the decode worker accept the epoch, then let the prefill worker connect; report connected() or
    connect_failed()."""

    prefill: WorkerInfo
    decode: WorkerInfo
    epoch: int


class TellGone(NamedTuple):
    """Tell a worker that a peer's process was seen dead."""

    worker_id: str
    gone: WorkerInfo


Effect = Start | Kill | Connect | TellGone


@dataclass(slots=True)
class _Worker:
    state: WorkerState = WorkerState.ABSENT
    incarnation: str = ""
    info: WorkerInfo | None = None
    start_at: float = 0.0
    num_failures: int = 0  # in a row, without having been ready


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
    """

    num_prefill: int
    num_decode: int
    backoff_s: float
    generation: int = 0
    _workers: dict[str, _Worker] = field(default_factory=dict, init=False)
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
        """What routers see: ready workers and connected pairs."""
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
        """Something kept a worker from starting or a pair from connecting."""
        self._error = text
        self._version += 1

    def changed(self) -> None:
        """Something has changed that is told with the view but is no part of this table."""
        self._version += 1

    @property
    def worker_ids(self) -> list[str]:
        return list(self._workers)

    def states(self) -> dict[str, str]:
        return {worker_id: str(worker.state) for worker_id, worker in self._workers.items()}

    def is_current(self, worker_id: str, incarnation: str) -> bool:
        return self._workers[worker_id].incarnation == incarnation

    def tick(self, now: float) -> list[Effect]:
        """What is due: workers to start, pairs to connect. Call it after every event and from time to time."""
        effects: list[Effect] = []
        for worker_id, worker in self._workers.items():
            if worker.state is WorkerState.ABSENT and worker.start_at <= now:
                worker.state, worker.incarnation = WorkerState.STARTING, self._new_incarnation(worker_id)
                effects.append(Start(worker_id, worker.incarnation))
        for (prefill_id, decode_id), pair in self._pairs.items():
            prefill, decode = self._workers[prefill_id], self._workers[decode_id]
            both = prefill.state is decode.state is WorkerState.READY
            if both and not pair.connected and not pair.connecting and pair.retry_at <= now:
                assert prefill.info is not None and decode.info is not None
                pair.epoch, pair.connecting = pair.epoch + 1, True
                effects.append(Connect(prefill.info, decode.info, pair.epoch))
        return effects

    def adopt(self, identities: Sequence[WorkerIdentity]) -> list[Effect]:
        """Go on from what a former table has left: workers that live, and their channels.

        Every writer of theirs that is not among them must have been seen dead before.
        """
        found = {identity.info.worker_id: identity for identity in identities}
        for worker_id, identity in found.items():
            worker = self._workers[worker_id]
            worker.state, worker.incarnation, worker.info = WorkerState.READY, identity.info.incarnation, identity.info
        for (prefill_id, decode_id), pair in self._pairs.items():
            opened = found[prefill_id].epochs.get(decode_id, 0) if prefill_id in found else 0
            accepted = found[decode_id].epochs.get(prefill_id, 0) if decode_id in found else 0
            pair.epoch = max(opened, accepted)
            pair.connected = opened == accepted > 0 and found[prefill_id].info in found[decode_id].writers
        self._version += 1
        alive = {identity.info.incarnation for identity in identities}
        return [
            TellGone(worker_id, writer)
            for worker_id, identity in found.items()
            for writer in identity.writers
            if writer.incarnation not in alive
        ]

    def ready(self, info: WorkerInfo) -> list[Effect]:
        """A started worker is loaded and listens. A late report of an older process is ignored."""
        worker = self._workers[info.worker_id]
        if worker.incarnation != info.incarnation or worker.state is not WorkerState.STARTING:
            return []
        worker.state, worker.info, worker.num_failures = WorkerState.READY, info, 0
        self._version += 1
        return []

    def suspect(self, worker_id: str, incarnation: str) -> list[Effect]:
        """A worker failed, hangs, or is said to be dead: it leaves the view, and its death is made sure of."""
        worker = self._workers[worker_id]
        if worker.incarnation != incarnation or worker.state not in (WorkerState.STARTING, WorkerState.READY):
            return []
        worker.state = WorkerState.DYING
        self._disconnect(worker_id)
        self._version += 1
        return [Kill(worker_id, incarnation)]

    def died(self, now: float, worker_id: str, incarnation: str) -> list[Effect]:
        """Its process was seen dead: peers may free what it could have written; another is started."""
        worker = self._workers[worker_id]
        if worker.incarnation != incarnation or worker.state is WorkerState.ABSENT:
            return []
        gone, worker.info = worker.info, None
        worker.state = WorkerState.ABSENT
        worker.start_at = now + min(MAX_BACKOFF_S, self.backoff_s * 2**worker.num_failures)
        worker.num_failures += 1
        self._disconnect(worker_id)
        self._version += 1
        if gone is None:
            return []
        peers = {p if d == worker_id else d for p, d in self._pairs if worker_id in (p, d)}
        return [TellGone(peer, gone) for peer in sorted(peers) if self._workers[peer].state is WorkerState.READY]

    def connected(self, prefill_id: str, decode_id: str, epoch: int) -> list[Effect]:
        pair = self._pairs[prefill_id, decode_id]
        if pair.epoch == epoch and pair.connecting:
            pair.connecting, pair.connected = False, True
            self._version += 1
        return []

    def connect_failed(self, now: float, prefill_id: str, decode_id: str, epoch: int) -> list[Effect]:
        """Tried again after the backoff, in a higher epoch."""
        pair = self._pairs[prefill_id, decode_id]
        if pair.epoch == epoch and pair.connecting:
            pair.connecting, pair.retry_at = False, now + self.backoff_s
        return []

    def open_channels(self, prefill_id: str, epochs: dict[str, int]) -> list[Effect]:
        """A prefill worker's open channels, by decode worker. A pair that lost its own is connected anew."""
        for (prefill, decode), pair in self._pairs.items():
            if prefill == prefill_id and pair.connected and epochs.get(decode) != pair.epoch:
                pair.connected = False
                self._version += 1
        return []

    def channel_broken(self, prefill_id: str, decode_id: str) -> list[Effect]:
        """The pair's channel does not bring anything over: it is opened anew, in a higher epoch."""
        self._pairs[prefill_id, decode_id].connected = False
        self._version += 1
        return []

    def _new_incarnation(self, worker_id: str) -> str:
        self._num_started += 1
        return f"{worker_id}.{self.generation}.{self._num_started}"

    def _disconnect(self, worker_id: str) -> None:
        for ids, pair in self._pairs.items():
            if worker_id in ids:
                pair.connected = pair.connecting = False
