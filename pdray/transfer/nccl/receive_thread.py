"""The nccl receiver on the device, of what one rank of each sender sends here: receives it, and unpacks it.

Everything of a grant is enqueued at once: a receive into a slot on the lane's stream, and behind it the unpacking,
which frees the slot. An abort of the lane's communicator ends its receives, and what is unpacked then goes to blocks of
leases that are held until it has (PendingWrites), and that never count.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from pdray.errors import TransferError
from pdray.transfer.nccl.communicator import GuardedCommunicator
from pdray.transfer.nccl.staging import PROBE_BYTES, Slot, Span, Staging
from pdray.transfer.nccl.threads import PollingThread, Watchdog
from pdray.transfer.ring import Region
from pdray.transfer.streams import DRAIN_TIMEOUT_S, Event, Stream

LOST_TIMEOUT_S = 0.3  # a worker that lives restores its connection within milliseconds
CROWDED_TIMEOUT_S = 1.0  # an event loop that is busy with other things answers a grant within a fifth of that


@dataclass(eq=False, slots=True)
class Lane:
    """One sender's communicator, by which one of its ranks sends here.

    Attributes:
        piece_bytes: see OpenCommunicators. is_connected: see Sink; from any thread.
        of: whatever the owner knows it by. error: why it was given up.
    """

    name: str
    epoch: int
    communicator: GuardedCommunicator
    stream: Stream
    piece_bytes: int
    is_connected: Callable[[], bool]
    of: Any = None
    error: str | None = None
    failed_at: float = 0.0


@dataclass(eq=False, slots=True)
class Arrival:
    """What comes by one lane of a put that was granted.

    Attributes:
        blocks: of the pool; none: it is a probe.
        of: whatever the owner knows it by.
        arrived: all of it is where it should be; probe: where it lies on the host. Set by the thread.
        is_over: nothing of it is written any more. Set by the thread.
    """

    lane: Lane
    layers: range
    blocks: list[int]
    of: Any = None
    arrived: bool = False
    probe: int | None = None
    is_over: bool = False


class Receiving(NamedTuple):
    """A receive, or the end of a grant, which ends nothing else."""

    lane: Lane
    done: Event
    ends_grant: bool = False


class Unpacking(NamedTuple):
    """Attributes:
    ids: that nothing needs after it. arrival: which is over with it.
    """

    done: Event
    ids: Region | None = None
    arrival: Arrival | None = None


class Patience(NamedTuple):
    """How long a lane's receives may stand still, and why so long."""

    seconds: float
    why: str


class ReceiveEvents(Protocol):
    """Events of the thread, which call_soon calls, in order."""

    def arrival_ended(self, arrival: Arrival) -> None:
        """Nothing of it is written any more. Comes once for each that was granted, also of a failed lane."""

    def grant_ended(self) -> None:
        """Everything of one receive() has been received, or its lane was given up and nothing of it is in flight."""

    def lane_failed(self, lane: Lane, reason: str) -> None:
        """A lane was given up by this thread or its watchdog."""

    def failed(self, error: BaseException) -> None:
        """The thread has ended: the device cannot be relied on."""


class ReceiveThread:
    """One thread and one watchdog for a lane of each sender. Every method may be called from any thread.

    Args:
        staging: this thread's alone. Unpacking runs on a stream of its own, receives run on their lanes'.
        timeout_s: a lane whose granted pieces do not get on for so long is given up.
        call_soon: runs a call where events are expected; in order.

    Attributes:
        others_wait: another sender's puts wait for the grant's end, so that it is given up after CROWDED_TIMEOUT_S. Its
            sender may be dead, or may have lost its puts; if it was only slow it connects again.
    """

    def __init__(
        self,
        staging: Staging,
        unpack_stream: Stream,
        events: ReceiveEvents,
        *,
        name: str,
        timeout_s: float,
        call_soon: Callable[[Callable[[], None]], None],
    ) -> None:
        self._staging = staging
        self._unpack_stream = unpack_stream
        self._events = events
        self._timeout_s = timeout_s
        self.others_wait = False
        self._call_soon = call_soon
        self._lock = threading.Lock()  # of lanes' errors
        self._active: Lane | None = None  # whose receives are under way; for the watchdog

        # the thread's own
        self._grants: deque[list[Arrival]] = deque()
        self._work: Iterator[None] | None = None  # enqueues the next grant
        self._receiving: deque[Receiving] = deque()  # all of one lane
        self._unpacking: deque[Unpacking] = deque()
        self._progress_at = 0.0

        self._thread = PollingThread(f"nccl-receive-{name}", self._poll, self._thread_failed)
        self._watchdog = Watchdog(f"nccl-receive-watch-{name}", self._expired)

    def receive(self, arrivals: list[Arrival]) -> None:
        """Receive these of one lane. Another lane's: not before the grants before have ended."""
        self._thread.post(lambda: self._grants.append(arrivals))

    def give_up(self, lane: Lane, reason: str) -> bool:
        """Abort a lane; False if it was given up before. Takes about half a second."""
        with self._lock:
            first = lane.error is None
            if first:
                lane.error, lane.failed_at = reason, time.monotonic()
        lane.communicator.close()
        self._thread.post(lambda: None)
        return first

    def stop(self) -> None:
        """End the thread. Not from the thread itself; lanes must have been given up before."""
        self._thread.stop()
        self._watchdog.stop()

    # the thread

    def _poll(self) -> bool:
        while self._receiving and self._receiving[0].done.query():
            if self._receiving.popleft().ends_grant:
                self._call_soon(self._events.grant_ended)
            self._progress_at = time.monotonic()
        while self._unpacking and self._unpacking[0].done.query():
            self._unpacked(self._unpacking.popleft())
        self._watch()  # a receive can hang
        while self._work is not None or self._grants:
            if self._work is None:
                self._progress_at = time.monotonic()
                self._work = self._receive_all(self._grants.popleft())
            if next(self._work, self) is not self:
                break
            self._work = None
        self._watch()
        return bool(self._receiving or self._unpacking)

    def _receive_all(self, arrivals: list[Arrival]) -> Iterator[None]:
        """Enqueue a grant. Yields while there is no room for block ids."""
        lane, staging = arrivals[0].lane, self._staging
        assert all(receiving.lane is lane for receiving in self._receiving), "two lanes' receives at a time"
        for arrival in arrivals:
            if not arrival.blocks:
                self._receive_probe(arrival)
            for span in staging.split(arrival.layers, len(arrival.blocks), lane.piece_bytes):
                while (ids := staging.allocate_ids(span)) is None:
                    yield
                self._receive_span(arrival, span, ids)
            self._unpacking.append(Unpacking(self._unpack_stream.record(), arrival=arrival))
        self._receiving.append(Receiving(lane, lane.stream.record(), ends_grant=True))

    def _receive_span(self, arrival: Arrival, span: Span, ids: Region) -> None:
        staging, stream = self._staging, self._unpack_stream
        stream.run(partial(staging.load_ids, ids, span, arrival.blocks))
        for piece in span.pieces:
            slot = staging.next_slot()
            if self._receive(arrival.lane, slot, staging.num_bytes(piece)):
                stream.run(partial(staging.unpack, slot, piece, span, ids))
                slot.free_after = stream.record()
        self._unpacking.append(Unpacking(stream.record(), ids))

    def _receive_probe(self, arrival: Arrival) -> None:
        slot, arrival.probe = self._staging.next_slot(), self._staging.next_probe()
        if self._receive(arrival.lane, slot, PROBE_BYTES):
            self._unpack_stream.run(partial(self._staging.read_probe, slot, arrival.probe))
            slot.free_after = self._unpack_stream.record()

    def _receive(self, lane: Lane, slot: Slot, num_bytes: int) -> bool:
        """Enqueue a receive, and let the unpacking wait for it. False if the lane has been given up."""
        if lane.error is not None:
            return False
        if slot.free_after is not None:
            lane.stream.wait(slot.free_after)
        try:
            lane.communicator.recv(self._staging.pointer(slot), num_bytes, lane.stream)
        except Exception as error:  # NCCL's, or the watchdog's abort; what was enqueued before ends with it
            self._fail(lane, f"{type(error).__name__}: {error}")
        slot.free_after = lane.stream.record()  # also of a call that failed: it may have enqueued something
        self._receiving.append(Receiving(lane, slot.free_after))
        self._unpack_stream.wait(slot.free_after)
        return lane.error is None

    def _unpacked(self, unpacking: Unpacking) -> None:
        if unpacking.ids is not None:
            self._staging.ids.free(unpacking.ids)
        arrival = unpacking.arrival
        if arrival is not None:
            lane, row = arrival.lane, arrival.probe
            arrival.arrived = lane.error is None and (row is None or self._staging.is_probe(row, lane.epoch))
            arrival.is_over = True
            self._call_soon(partial(self._events.arrival_ended, arrival))

    def _watch(self) -> None:
        lane = self._receiving[0].lane if self._receiving else None
        now = time.monotonic()
        if lane is not None and lane.error is not None and now > lane.failed_at + DRAIN_TIMEOUT_S:
            raise TransferError(f"{lane.name}: its stream has not drained {DRAIN_TIMEOUT_S:g} s after the abort")
        self._active = lane if lane is not None and lane.error is None else None
        patience = None if self._active is None else self._patience(self._active)
        self._watchdog.set(None if patience is None else self._progress_at + patience.seconds)

    # failures

    def _patience(self, lane: Lane) -> Patience:
        patience = Patience(self._timeout_s, "worker_timeout_s")
        if self.others_wait:
            patience = min(patience, Patience(CROWDED_TIMEOUT_S, "others waited"))
        if not lane.is_connected():
            patience = min(patience, Patience(LOST_TIMEOUT_S, "its connection was lost"))
        return patience

    def _fail(self, lane: Lane, reason: str) -> None:
        if self.give_up(lane, reason):
            self._call_soon(lambda: self._events.lane_failed(lane, reason))

    def _expired(self) -> None:
        """The watchdog's thread."""
        lane = self._active
        if lane is not None and time.monotonic() >= self._progress_at + (patience := self._patience(lane)).seconds:
            self._fail(lane, f"a transfer did not get on for {patience.seconds:g} s ({patience.why})")

    def _thread_failed(self, error: BaseException) -> None:
        self._call_soon(lambda: self._events.failed(error))
